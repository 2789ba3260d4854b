"""lm-eval's models of ours against its own hf model: sample by sample, style by style, and through its command line."""

import json
import sys

import pytest
import torch

from pikv_ds import bundled
from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.launch.evaluation.lm_eval import main as lm_eval_main
from pikv_ds.launch.evaluation.lm_eval import register
from pikv_ds.launch.evaluation.scoring import Continuations
from tests.dist.launcher import run_commands, run_gloo
from tests.launch.lm_eval_models import save
from tests.launch.lm_eval_styles import SHORT_FORM, STYLES, TEXT, Style, answers, assert_equal, likely
from tests.long_form import LONG, short_or_long

INSTALL = "lm-eval is not installed; pip install '.[eval]'"
TOLERANCE = 1e-3  # of a sum of up to 400 log-probabilities in fp32


def model_of(name: str):
    pytest.importorskip("lm_eval.models.huggingface", reason=INSTALL)
    register()
    from lm_eval.api.registry import get_model

    return get_model(name)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of a style: what both models take."""
    folders = {}

    def of(style) -> dict:
        if style.model not in folders:
            folders[style.model] = save(style.model, tmp_path_factory.mktemp(style.model))
        return {"pretrained": folders[style.model], "dtype": "float32", "batch_size": style.batch, **style.args}

    return of


def expected(style, args: dict) -> list:
    return answers(model_of("hf")(device="cpu", **args), style)


@pytest.mark.parametrize("name", short_or_long(SHORT_FORM, list(STYLES)))
def test_every_sample_is_that_of_lm_evals_own_model(arguments, name):
    """Long form: every style."""
    style = STYLES[name]
    ours = model_of("pikv_ds")(**arguments(style))
    assert_equal(answers(ours, style), expected(style, arguments(style)), TOLERANCE)


@pytest.mark.skipif(not LONG, reason="long form: starts processes that import lm-eval")
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize("host, ranks", [("pikv_ds", 2), ("pikv_megatron", 1), ("pikv_megatron", 2)])
def test_on_ranks_and_under_megatron(arguments, tmp_path, host, ranks):
    """All styles on every rank. Refused: automatic batches on several ranks, beams under Megatron."""
    known = {name: (arguments(style), expected(style, arguments(style))) for name, style in STYLES.items()}
    (tmp_path / "expected.json").write_text(json.dumps(known))
    result = run_gloo("harness.py", [host, tmp_path / "expected.json"], ranks=ranks, timeout_s=800)
    for name in STYLES:
        result.check(name)
    assert result.returncode == 0, result.describe()


def test_what_is_scored_reads_the_store(arguments):
    """Contexts shorter than a chunk, in one batch, kept in 4 bits; and the host's own cache, which is exact."""
    pairs = [(TEXT[:30], " the"), (TEXT[:30], " of"), (TEXT[100:160], " the battle of"), (TEXT[200:215], " a")]
    style = Style(asked=[likely(*pairs)], batch=4)
    args, (theirs,) = arguments(style), expected(style, arguments(style))
    (scored,) = answers(model_of("pikv_ds")(**args, config='{"compression": {"method": "int4"}}'), style)
    assert all(abs(own - other) > 0.002 for (own, _), (other, _) in zip(scored, theirs, strict=True)), (scored, theirs)
    assert_equal(answers(model_of("pikv_ds")(**args, dense=True), style), [theirs], TOLERANCE)


def test_a_forward_begins_at_every_first_scored_column():
    requests = [(None, [5, 6, 7], [8, 9]), (None, [5, 6, 7, 8], [1]), (None, [3, 0], [0, 2]), (None, list(range(10, 30)), [4])]
    found = Continuations(requests, 12)
    assert found.forwards(torch.tensor([[5, 6, 7, 8]]), 32) == [2, 1, 1]
    assert found.forwards(torch.tensor([[5, 6, 7, 8, 0, 0], [3, 0, 0, 0, 0, 0]]), 32) == [1, 1, 1, 3]
    assert found.forwards(torch.tensor([list(range(18, 30))]), 5) == [5, 5, 1, 1]
    assert Continuations().forwards(torch.ones(2, 7, dtype=torch.int64), 3) == [3, 3, 1]
    with pytest.raises(UnsupportedError, match="a continuation of 13 tokens leaves no room for a context in 12 tokens"):
        Continuations([(None, [1], [1] * 13)], 12)


@pytest.mark.parametrize(
    "args, words",
    [
        ({"peft": "folder"}, "model_args has the key 'peft', which this model does not take"),
        ({"parallelize": True}, "model_args has the key 'parallelize'"),
        ({"mixed_precision_dtype": "bfloat16"}, "model_args has the key 'mixed_precision_dtype'"),
        ({"dtype": "float64"}, "dtype = 'float64': legal dtypes are auto, float32"),
        ({"device": "meta"}, "device = 'meta': the model is on"),
        ({"chunk": 64}, "in chunks of 64: 0.0% of the entries"),
    ],
)
def test_what_is_not_served_is_refused_by_name(args, words):
    with pytest.raises(ConfigError, match=words):
        model_of("pikv_ds")(max_length=64, **args)


def test_automatic_batches_on_several_ranks_are_refused(monkeypatch):
    cls = model_of("pikv_ds")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedError, match="batch_size = 'auto:4' on 2 ranks"):
        cls(max_length=64, batch_size="auto:4")


def test_the_configurations_dtype_is_the_default():
    """bfloat16 for the bundled model, as for lm-eval's own; the softmax is taken in it."""
    lm = model_of("pikv_ds")(max_length=64)
    assert lm.model.dtype == torch.bfloat16 and lm._model_call(torch.ones(1, 4, dtype=torch.int64)).dtype == torch.bfloat16
    assert lm.max_length == 64 and model_of("pikv_ds")().max_length == 4096


TASKS = {
    "pikv_passkey": "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 8, do_sample: false}\n"
    "filter_list: [{name: digits, filter: [{function: regex, regex_pattern: '([0-9]+)'}, {function: take_first}]}]\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    "pikv_choice": "output_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 1\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "pikv_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{prompt}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n",
    "pikv_sampled": "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 12, do_sample: true, temperature: 0.9}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    pytest.importorskip("lm_eval.models.huggingface", reason=INSTALL)
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
    command += ["--batch_size", "2", "--device", "cpu", "--output_path", str(out), "--log_samples", *options]
    result = run_commands([command], ranks=1, timeout_s=200, env={"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "hf")})
    assert result.returncode == 0, result.describe()
    (written,) = out.rglob("results_*.json")
    return json.loads(written.read_text())["results"]


def responses(tasks, model: str, name: str) -> list:
    (written,) = (tasks / model).rglob(f"samples_{name}_*.jsonl")
    return [json.loads(line)["resps"] for line in written.read_text().splitlines()]


@pytest.mark.skipif(not LONG, reason="long form: starts processes that import lm-eval")
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(400)
def test_lm_eval_gives_the_scores_of_its_own_model(tasks):
    names = ["--tasks", *TASKS]
    args = f"pretrained={bundled.model_path()},dtype=float32,max_length=120"
    own = lm_eval(tasks, ["lm_eval"], "hf", args, *names)
    ours = lm_eval(tasks, ["pikv_ds.launch.evaluation.lm_eval"], "pikv_ds", args + ",chunk=2", *names)
    assert responses(tasks, "pikv_ds", "pikv_sampled") == responses(tasks, "hf", "pikv_sampled")  # lm-eval seeds before it loads
    assert ours["pikv_passkey"]["exact_match,digits"] == own["pikv_passkey"]["exact_match,digits"]
    assert ours["pikv_choice"]["acc,none"] == own["pikv_choice"]["acc,none"]
    assert ours["pikv_rolling"]["bits_per_byte,none"] == pytest.approx(own["pikv_rolling"]["bits_per_byte,none"], rel=1e-4)


@pytest.mark.skipif(not LONG, reason="long form: starts processes that import lm-eval")
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(400)
def test_lm_eval_on_two_megatron_ranks_finds_the_pass_keys(tasks):
    program = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pikv_ds.launch.evaluation.lm_eval"]
    results = lm_eval(tasks, program, "pikv_megatron", "max_length=256,ep=2,dtype=float32", "--tasks", "pikv_passkey", "pikv_choice")
    assert results["pikv_passkey"]["exact_match,digits"] == 1.0 and results["pikv_choice"]["acc,none"] == 1.0


def test_its_command_line(tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tasks / "hf"))
    options = ["--model", "pikv_ds", "--model_args", f"pretrained={bundled.model_path()},dtype=float32,max_length=256", "--tasks"]
    options += ["pikv_passkey", "pikv_choice", "--include_path", str(tasks), "--device", "cpu", "--output_path", str(tasks / "here")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options])
    assert lm_eval_main() in (None, 0)
    (written,) = (tasks / "here").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert results["pikv_passkey"]["exact_match,digits"] == 1.0 and results["pikv_choice"]["acc,none"] == 1.0


def test_without_lm_eval_the_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    assert lm_eval_main() == 2
    assert "lm-eval can't be imported" in capsys.readouterr().err


@pytest.mark.skipif(not LONG, reason="long form: lm-eval reads all of its tasks")
def test_a_missing_task_is_named(tasks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "pikv_ds", "--tasks", "no_such_task"])
    assert lm_eval_main() == 2
    assert "lm_eval: Tasks not found: no_such_task" in capsys.readouterr().err
