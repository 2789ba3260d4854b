"""Scoring and generation for evaluation harnesses, against transformers; lm-eval's command line against its own model."""

import json
import sys

import pytest
import torch

from pikv_ds import bundled
from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.launch.evaluation.lm_eval import _greedy_options, open_scorer
from pikv_ds.launch.evaluation.lm_eval import main as lm_eval_main
from tests.dist.launcher import run_commands

TEXT = bundled.evaluation_text()


@pytest.fixture(scope="module")
def model():
    return bundled.load()[0]


@pytest.fixture(scope="module")
def scorer():
    return open_scorer("hf", max_length=200, batch_size=2, chunk=4)


def ids_of(scorer, text: str) -> list[int]:
    return scorer.backend.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("dense", [False, True])
def test_log_likelihoods_are_those_of_one_forward(model, scorer, dense):
    scorer = open_scorer("hf", max_length=200, batch_size=2, chunk=4, dense=True) if dense else scorer
    ids = ids_of(scorer, TEXT[:4000])
    shapes = [(30, 3), (7, 1), (30, 3), (12, 9), (30, 3), (1, 1), (260, 5)]
    pairs = [(ids[i * 40 : i * 40 + c], ids[i * 40 + c : i * 40 + c + n]) for i, (c, n) in enumerate(shapes)]
    greedy_ids = torch.tensor([pairs[0][0]])
    greedy = model.generate(greedy_ids, max_new_tokens=2, do_sample=False)[0, 30:].tolist()
    pairs.append((pairs[0][0], greedy))
    done = []
    results = scorer.loglikelihoods(pairs, done.append)
    assert sum(done) == len(pairs) and max(done) == 2
    for (context, continuation), (score, is_greedy) in zip(pairs, results, strict=True):
        whole = torch.tensor([(context + continuation)[-201:]])
        with torch.no_grad():
            log_probs = model(whole).logits[0, :-1].log_softmax(-1)[-len(continuation) :]
        expected = log_probs.gather(-1, torch.tensor(continuation).unsqueeze(-1)).sum().item()
        assert score == pytest.approx(expected, abs=1e-4)
        assert is_greedy == (log_probs.argmax(-1).tolist() == continuation)
    assert results[-1][1]


def test_generation_is_greedy_and_stops(model, scorer):
    ids = ids_of(scorer, TEXT[:4000])
    prompts = [ids[:50], ids[100:150], ids[200:230]]
    texts = scorer.generate([(prompt, 12, ()) for prompt in prompts], lambda rows: None)
    for prompt, text in zip(prompts, texts, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert text == scorer.backend.tokenizer.decode(expected)
    stop = texts[0][5:8]
    (stopped,) = scorer.generate([(prompts[0], 12, (stop, "no such text"))], lambda rows: None)
    assert stopped == texts[0][: texts[0].find(stop)]


def test_what_does_not_fit_is_refused(scorer):
    with pytest.raises(UnsupportedError, match="a continuation of 201 tokens leaves no room"):
        scorer.loglikelihoods([([5], [5] * 201)], lambda rows: None)
    with pytest.raises(UnsupportedError, match="200 new tokens leave no room"):
        scorer.generate([([5], 200, ())], lambda rows: None)
    with pytest.raises(ConfigError, match="unknown key 'chunks'"):
        open_scorer("hf", chunks=4)
    with pytest.raises(ConfigError, match="batch_size = 'auto'"):
        open_scorer("hf", batch_size="auto")
    with pytest.raises(UnsupportedError, match="only greedy decoding"):
        _greedy_options({"do_sample": True, "temperature": 0.7}, scorer.backend.tokenizer)
    assert _greedy_options({"until": ["\n"], "max_gen_toks": 7}, scorer.backend.tokenizer) == (
        7,
        ("\n", scorer.backend.tokenizer.eos_token),
    )


TASKS = {
    "pikv_passkey": "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 8, do_sample: false}\n"
    "filter_list: [{name: digits, filter: [{function: regex, regex_pattern: '([0-9]+)'}, {function: take_first}]}]\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    "pikv_choice": "output_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 1\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "pikv_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{prompt}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'lm-eval>=0.4.9,<0.5'")
    folder, tokenizer = tmp_path_factory.mktemp("tasks"), bundled.load()[1]
    with (folder / "docs.jsonl").open("w") as file:
        for seed in range(4):
            ids, key = bundled.passkey_prompt(tokenizer, 150, seed=seed)
            wrong = key[1:] + key[:1]
            file.write(json.dumps({"prompt": tokenizer.decode(ids), "answer": key, "choices": [f" {wrong}", f" {key}"]}) + "\n")
    for name, body in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{folder / 'docs.jsonl'}'}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{body}")
    return folder


def lm_eval(tasks, program: list[str], model: str, model_args: str, *options: str) -> dict:
    out = tasks / model / model_args.replace("/", "_")
    command = [sys.executable, "-m", *program, "--model", model, "--model_args", model_args, "--include_path", str(tasks)]
    command += ["--batch_size", "2", "--device", "cpu", "--output_path", str(out), *options]
    result = run_commands([command], ranks=1, timeout_s=200, env={"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "hf")})
    assert result.returncode == 0, result.describe()
    (written,) = out.rglob("results_*.json")
    return json.loads(written.read_text())["results"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(400)
def test_lm_eval_gives_the_scores_of_its_own_model(tasks):
    names = ["--tasks", *TASKS]
    args = f"pretrained={bundled.model_path()},dtype=float32,max_length=120"
    own = lm_eval(tasks, ["lm_eval"], "hf", args, *names)
    ours = lm_eval(tasks, ["pikv_ds.launch.evaluation.lm_eval"], "pikv_ds", args + ",chunk=2", *names)
    assert ours["pikv_passkey"]["exact_match,digits"] == own["pikv_passkey"]["exact_match,digits"]
    assert ours["pikv_choice"]["acc,none"] == own["pikv_choice"]["acc,none"]
    assert ours["pikv_rolling"]["bits_per_byte,none"] == pytest.approx(own["pikv_rolling"]["bits_per_byte,none"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(400)
def test_lm_eval_on_two_megatron_ranks_finds_the_pass_keys(tasks):
    program = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pikv_ds.launch.evaluation.lm_eval"]
    results = lm_eval(tasks, program, "pikv_megatron", "max_length=256,ep=2", "--tasks", "pikv_passkey", "pikv_choice")
    assert results["pikv_passkey"]["exact_match,digits"] == 1.0 and results["pikv_choice"]["acc,none"] == 1.0


def test_without_lm_eval_the_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert lm_eval_main() == 2
    assert "lm-eval can't be imported" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.dist
def test_a_missing_task_is_named(tasks):
    command = [sys.executable, "-m", "pikv_ds.launch.evaluation.lm_eval", "--model", "pikv_ds", "--tasks", "no_such_task"]
    result = run_commands([command], ranks=1, timeout_s=150)
    assert result.returncode == 2 and "lm_eval: Tasks not found: no_such_task" in result.output, result.describe()
