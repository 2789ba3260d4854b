"""`pikv eval`: rows against independent figures, a cache that forgets, resuming, ranks, refusals."""

import contextlib
import io
import json
import math

import pytest
import torch
from transformers import DynamicCache

from pikv_ds import bundled
from pikv_ds.adapters.hf.attach import attach
from pikv_ds.bundled.recall import Prose
from pikv_ds.launch.cli import main
from pikv_ds.launch.evaluation import hf, ppl
from pikv_ds.launch.evaluation.job import progress_bar
from pikv_ds.launch.evaluation.partial import Partial, key_of
from pikv_ds.launch.evaluation.ppl import measure_ppl
from pikv_ds.launch.evaluation.recall import measure_recall
from pikv_ds.launch.evaluation.rows import COLUMNS
from pikv_ds.launch.evaluation.spec import EvalSpec, Unit, fit_chunk, scored_queries, store_share
from pikv_ds.launch.jobs import megatron_eval
from pikv_ds.spec import LayerSpec
from tests.launch.test_demo_and_generate import pikv

CONTEXT, SAMPLES = 256, 4
SMALL = ["--context", str(CONTEXT), "--samples", str(SAMPLES)]
BLOCK = {"page_size": 16, "storage": {"num_shards": 2}}
FULL = LayerSpec(layer_idx=0, num_kv_heads=1, k_dim=4, v_dim=4)


def spec(**changes) -> EvalSpec:
    fields = dict(
        backend="hf",
        model=str(bundled.model_path()),
        load=None,
        text=None,
        context=CONTEXT,
        chunk=16,
        samples=SAMPLES,
        batch=3,
        seed=0,
        dtype="float32",
        requests="replicated",
        ranks=1,
        tp=1,
        ep=1,
    )
    return EvalSpec(**(fields | changes))


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    file = tmp_path_factory.mktemp("eval") / "rows.json"
    assert main(["eval", *SMALL, "--batch", "3", "--config", json.dumps(BLOCK), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def rows_of(document) -> dict:
    return {(row["method"], row["task"]): row for row in document["rows"]}


def test_rows_have_the_columns_and_say_how_they_were_made(document):
    rows = rows_of(document)
    assert list(rows) == [("dense", "ppl"), ("dense", "recall"), ("exact", "ppl"), ("exact", "recall")]
    for row in rows.values():
        assert list(row) == [*COLUMNS, "detail"]
        assert row["chunk"] == 16 and row["detail"]["store_share"] >= 0.95 and row["dtype"] == "float32" and row["ranks"] == 1
    assert rows["exact", "ppl"]["config"] == BLOCK and rows["dense", "ppl"]["config"] is None
    assert rows["dense", "ppl"]["attention_impl"] == "DynamicCache + sdpa" and rows["exact", "ppl"]["attention_impl"] == "pikv cpu fp32"
    assert "--context 256 --samples 4 --batch 3 --seed 0" in document["command"] and document["versions"]["transformers"]


def test_perplexity_is_that_of_one_dense_forward(document):
    model, tokenizer = bundled.load()
    prose = Prose(tokenizer, bundled.evaluation_text())
    windows = hf_windows(prose)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(windows).logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none")
    expected = losses[:, -CONTEXT // 2 :].mean().exp().item()
    rows = rows_of(document)
    assert rows["dense", "ppl"]["ppl"] == pytest.approx(expected, rel=1e-5)
    assert rows["exact", "ppl"]["ppl"] == pytest.approx(expected, rel=1e-5)
    assert abs(rows["exact", "ppl"]["ppl_change_pct"]) < 1e-3 and abs(rows["exact", "ppl"]["kl"]) < 1e-6
    assert rows["exact", "ppl"]["detail"]["scored_tokens"] == SAMPLES * CONTEXT // 2


def test_kl_is_from_one_dense_forward_to_the_measured_cache(tmp_path):
    block = {"compression": {"method": "int4"}}
    file = tmp_path / "rows.json"
    assert main(["eval", *SMALL, "--batch", "3", "--tasks", "ppl", "--config", json.dumps(block), "--json", str(file)]) == 0
    row = rows_of(json.loads(file.read_text()))["int4", "ppl"]
    model, tokenizer = bundled.load()
    windows = hf_windows(Prose(tokenizer, bundled.evaluation_text()))
    with torch.no_grad():
        dense = model(windows).logits.double().log_softmax(-1)
        with attach(model, block) as cache:
            fed = [model(part, past_key_values=cache, use_cache=True).logits for part in windows.split(row["chunk"], 1)]
    own = torch.cat(fed, 1).double().log_softmax(-1)
    scored = slice(CONTEXT // 2 - 1, CONTEXT - 1)
    kl = (dense.exp() * (dense - own)).sum(-1)[:, scored].mean().item()
    losses = -own[:, :-1].gather(-1, windows[:, 1:, None])[:, scored]
    assert kl > 1e-4 and row["kl"] == pytest.approx(kl, rel=1e-3)
    assert row["ppl"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)


def hf_windows(prose: Prose) -> torch.Tensor:
    """The windows of seed 0, found by what they must be: SAMPLES different pieces of the text, aligned to the context, in order."""
    from pikv_ds.launch.evaluation.ppl import windows_of

    windows = windows_of(spec(), prose, data_rank=0)
    starts = [next(s for s in range(0, len(prose.ids), CONTEXT) if prose.ids[s : s + CONTEXT] == row) for row in windows.tolist()]
    assert len(set(starts)) == SAMPLES and starts == sorted(starts)
    return windows


def test_facts_are_found_and_bytes_are_measured(document):
    rows = rows_of(document)
    for method in ("dense", "exact"):
        row = rows[method, "recall"]
        assert row["recall"] >= 0.95 and row["step_ms"] > 0
        assert row["detail"]["found_by_kind"] == {"code": [2, 2], "passkey": [2, 2]}
        assert sum(asked for _, asked in row["detail"]["found_by_depth"]) == SAMPLES
    # 4 layers x 2 KV heads x 32 x (K and V) x 4 bytes in fp32; 3 windows are in the cache at a time.
    dense, exact = rows["dense", "ppl"], rows["exact", "ppl"]
    assert dense["bytes_per_token"] == 2048 and dense["compression"] == 0.5 and dense["kv_bytes_per_rank"] == [2048 * 3 * CONTEXT]
    assert exact["kv_bytes_per_rank"][0] == exact["bytes_per_token"] * 3 * CONTEXT
    assert 2048 + 16 <= exact["bytes_per_token"] < 1.25 * 2064 + 2 * 16 * 2064 / CONTEXT  # positions, slabs, open pages
    assert exact["compression"] == pytest.approx(1024 / exact["bytes_per_token"])


def test_the_dense_cache_runs_once_for_all_configurations_of_a_run(monkeypatch):
    opened = []

    class Backend(hf.HFBackend):
        def session(self, block, rows, length):
            opened.append(block is None)
            return super().session(block, rows, length)

    first, other = spec(samples=2, batch=1), spec(samples=2, batch=1, seed=1)
    backend = Backend(first, 60)
    prose = Prose(backend.tokenizer, bundled.evaluation_text())

    def run(run_spec, block):
        opened.clear()
        with torch.no_grad():
            return measure_ppl(backend, run_spec, prose, block, lambda done: None)

    dense = run(first, None)
    assert opened == [True, True]
    again = run(first, {"compression": {"method": "int8"}})
    assert opened == [False, False] and again[0].dense_nll == dense[0].nll and again[0].kl > 0
    assert run(first, None) == dense and opened == []
    run(other, None)
    assert opened == [True, True], "other windows"
    monkeypatch.setattr(ppl, "MOST_KEPT", 0)
    run(first, None), run(first, None)
    assert opened == [True, True], "nothing is kept that is too large"


def test_a_cache_that_forgets_is_seen():
    class Forgetful(hf.DenseSession):
        def feed(self, ids, **how):
            self.cache = DynamicCache(config=self.model.config)
            return super().feed(ids, **how)

    class Backend(hf.HFBackend):
        @contextlib.contextmanager
        def session(self, block, rows, length):
            yield (hf.DenseSession if block is None else Forgetful)(self.model)

    backend, run = Backend(spec(), 60), spec()
    prose = Prose(backend.tokenizer, bundled.evaluation_text())
    with torch.no_grad():
        sums, _, _ = measure_ppl(backend, run, prose, {}, lambda done: None)
        (answers, _), _, _ = measure_recall(backend, run, prose, {}, lambda done: None)
    assert math.exp((sums.nll - sums.dense_nll) / sums.tokens) > 1.5 and sums.kl / sums.tokens > 0.2, sums
    assert not any(answer.found for answer in answers)


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    command = ["eval", *SMALL, "--samples", "2", "--json", str(file)]
    add, measured = Partial.add, []

    def stop_at_third(self, key, row):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(row["task"])
        add(self, key, row)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Partial, "add", stop_at_third)
        main(command)
    assert not file.exists() and len(Partial(tmp_path / "rows.json.partial").rows) == 2
    monkeypatch.setattr(Partial, "add", lambda self, key, row: (measured.append(row["task"]), add(self, key, row)))
    assert main(command) == 0
    assert "2 of 4 units are in" in capsys.readouterr().out
    assert measured == ["ppl", "recall"] * 2 and len(json.loads(file.read_text())["rows"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_terminal_sees_how_far_it_is():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    with progress_bar("ppl, exact", 4, shown) as advance:
        advance(2)
        advance(2)
    assert "ppl, exact" in shown.getvalue() and "4/4" in shown.getvalue()


def test_finished_rows_are_of_the_same_command_only(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a")
    unit, other = Unit(task="ppl", block={}), Unit(task="ppl", block={"page_size": 8})
    keys = [key_of(spec(), unit), key_of(spec(), other), key_of(spec(seed=1), unit), key_of(spec(text=str(text)), unit)]
    text.write_text("ab")
    assert len({*keys, key_of(spec(text=str(text)), unit)}) == 5 and key_of(spec(), unit) == keys[0]


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_under_autoep_share_the_samples_and_give_the_figures_of_one(document, tmp_path):
    file = tmp_path / "rows.json"
    result = pikv("eval", *SMALL, "--config", json.dumps(BLOCK), "--ranks", 2, "--requests", "distinct", "--json", file)
    assert result.returncode == 0, result.describe()
    one, two = rows_of(document), rows_of(json.loads(file.read_text()))
    assert two.keys() == one.keys()
    for key, row in two.items():
        assert row["ep"] == 2 and row["recall"] == one[key]["recall"]
        assert (row["ppl"] or 0) == pytest.approx(one[key]["ppl"] or 0, rel=1e-6)
        for name in ("scored_tokens", "found_by_kind", "found_by_depth"):
            assert row["detail"].get(name) == one[key]["detail"].get(name)
    dense, exact = two["dense", "ppl"], two["exact", "ppl"]
    assert dense["bytes_per_token"] == 2048 and dense["kv_bytes_per_rank"] == [2048 * 2 * CONTEXT] * 2
    assert sum(exact["kv_bytes_per_rank"]) == exact["bytes_per_token"] * 4 * CONTEXT < 1.35 * sum(dense["kv_bytes_per_rank"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "ppl,poem"], "--tasks 'ppl,poem': legal are ppl, recall"),
        (["--chunk", "0"], "--chunk 0: legal is 1 or more"),
        (["--context", "256", "--chunk", "32"], "91.4% of the entries that scored queries read come from the store, at least 95%"),
        (["--context", "9000"], "--context 9000: legal for this model is 2 to 4096"),
        (["--context", "40", "--tasks", "recall"], "--context 40 for task recall: length = 34: legal for kind 'passkey'"),
        (["--samples", "0"], "--samples 0: legal is 1 or more"),
        (["--samples", "500"], "--samples 500: the text has"),
        (["--config", "{not json"], "is not JSON"),
        (["--config", '{"page_sise": 8}'], "page_sise"),
        (["--config", '{"enabled": false}'], "pikv.enabled is false"),
        (["--tp", "2", "--ranks", "2"], "--tp 2 with --backend hf"),
        (["--ranks", "3"], "--ep 3: the 8 experts of this model"),
        (["--ranks", "4", "--ep", "3"], "--ep 3: legal with --ranks 4"),
        (["--ranks", "2", "--requests", "distinct", "--samples", "5"], "--samples 5 with --requests distinct"),
        (["--load", "somewhere"], "--load somewhere with --backend hf"),
        (["--backend", "megatron", "--load", "somewhere"], "no folder 'somewhere'"),
        (["--text", "no_such_file.txt"], "no text file 'no_such_file.txt'"),
        (["--model", "no_such_folder"], "no_such_folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, message, capsys):
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_mistakes_of_ranks_that_torchrun_started(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["megatron_eval", "--ep", "3"])
    with pytest.raises(SystemExit, match="2"):
        megatron_eval.main()
    assert "started without a launcher; use torchrun --nproc-per-node R -m pikv_ds.launch.jobs.megatron_eval" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, told in (("0", "megatron_eval: --ep 3: legal with --ranks 2 are its divisors"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert megatron_eval.main() == 2
        assert capsys.readouterr().err.strip() == told


def test_chunks_leave_95_percent_to_the_store():
    assert [fit_chunk([FULL], context, None) for context in (2048, 1024, 256, 128, 64)] == [32, 32, 16, 8, 2]
    assert list(scored_queries(8)) == [3, 4, 5, 6]
    # Queries 3 to 6 in chunks of 2 read 4 + 5 + 6 + 7 entries, 2 + 1 + 2 + 1 of them their chunk's own.
    assert store_share([FULL], 8, 2) == pytest.approx(1 - 6 / 22)
    window = LayerSpec(layer_idx=0, num_kv_heads=1, k_dim=4, v_dim=4, window=3)
    assert store_share([window], 8, 2) == pytest.approx(1 - 6 / 12)
