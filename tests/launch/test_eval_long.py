"""What makes `pikv eval` fit real models: long forwards before what is measured, fewer scored tokens, agreement, caches of others."""

import json

import pytest
import torch
from transformers import DynamicCache

from pikv_ds import bundled
from pikv_ds.bundled.recall import Prose
from pikv_ds.launch.cli import main
from pikv_ds.launch.evaluation import hf
from pikv_ds.launch.evaluation.agreement import CHOSEN, measure_agreement
from pikv_ds.launch.evaluation.hf_quantized import HFCacheKind
from pikv_ds.launch.evaluation.others import Press, Quantized, parse_other
from pikv_ds.launch.evaluation.spec import pieces, scored_queries
from tests.launch.test_eval import spec

SMALL = ["--context", "512", "--samples", "2", "--batch", "2"]


def rows(tmp_path, *words: str) -> dict:
    file = tmp_path / "rows.json"
    assert main(["eval", *SMALL, *words, "--json", str(file)]) == 0
    return {(row["method"], row["task"]): row for row in json.loads(file.read_text())["rows"]}


def test_forwards_are_long_up_to_what_is_measured():
    assert pieces(100, spec(chunk=16), 70) == [(n, min(n + 16, 100)) for n in range(0, 100, 16)], "without a longer one all are chunks"
    found = pieces(100, spec(chunk=16, prefill_chunk=48), 70)
    assert found == [(0, 48), (48, 64), (64, 80), (80, 96), (96, 100)]
    assert pieces(100, spec(chunk=16, prefill_chunk=512), 70)[:2] == [(0, 64), (64, 80)]
    assert pieces(10, spec(chunk=16, prefill_chunk=512), 9) == [(0, 10)]
    assert list(scored_queries(100, 3)) == [96, 97, 98]


@pytest.mark.parametrize("block", [{}, {"compression": {"method": "int8"}}], ids=["exact", "int8"])
def test_long_forwards_give_the_numbers_of_chunks(tmp_path, block):
    """The same where nothing is lost. With codes the first part of the window was computed from raw entries: other errors of the same
    size, far below those of the codec with half the bits."""
    words = ["--tasks", "ppl,recall" if not block else "ppl", "--config", json.dumps(block), "--scored", "64"]
    slow, fast = rows(tmp_path, *words), rows(tmp_path, *words, "--prefill-chunk", "256")
    tolerance = 0.2 if block else 1e-4  # of the change in percent
    for key, row in slow.items():
        assert fast[key]["recall"] == row["recall"] and fast[key]["chunk"] == row["chunk"]
        if row["ppl"] is not None:
            assert row["detail"]["scored_tokens"] == 2 * 64 and fast[key]["detail"]["prefill_chunk"] == 256
            assert fast[key]["ppl"] == pytest.approx(row["ppl"], rel=1e-6 + tolerance / 100)
            assert abs(fast[key]["ppl_change_pct"] - row["ppl_change_pct"]) < tolerance
            assert abs(fast[key]["kl"]) < (1e-4 if block else 1e-7)
    if block:
        assert fast["int8", "ppl"]["kl"] > 1e-6


def test_chunks_are_as_long_as_the_store_allows(tmp_path, capsys):
    found = rows(tmp_path, "--chunk", "36", "--tasks", "ppl", "--scored", "100")
    assert found["exact", "ppl"]["chunk"] == 36 and found["exact", "ppl"]["detail"]["store_share"] > 0.95
    assert main(["eval", *SMALL, "--chunk", "64", "--tasks", "ppl"]) == 2
    assert "at least 95% must" in capsys.readouterr().err
    assert main(["eval", *SMALL, "--scored", "300"]) == 2
    assert "--scored 300: legal with --context 512 is 1 to 256" in capsys.readouterr().err


def test_agreement_is_whole_for_an_exact_cache_and_little_for_one_that_forgets():
    class Forgetful(hf.DenseSession):
        def feed(self, ids, *, last=False):
            self.cache = DynamicCache(config=self.model.config)
            return super().feed(ids, last=last)

    run = spec(context=384, samples=2, batch=2, prefill_chunk=256)
    backend = hf.HFBackend(run, 60)
    prose = Prose(backend.tokenizer, bundled.evaluation_text())
    with torch.no_grad():
        exact, _, _ = measure_agreement(backend, run, prose, {}, lambda done: None)
        backend.session = lambda block, rows, length: _opened(Forgetful(backend.model))
        forgets, _, _ = measure_agreement(backend, run, prose, {}, lambda done: None)
    assert [tuple(row) for row in exact] == [(CHOSEN, CHOSEN)] * 2
    assert all(row.alike < 0.7 * CHOSEN and row.until_first < 30 for row in forgets), forgets


class _opened:
    def __init__(self, session) -> None:
        self.session = session

    def __enter__(self):
        return self.session

    def __exit__(self, *exc) -> None:
        pass


def test_the_tokens_that_agree_are_those_of_one_dense_forward():
    """Teacher-forced: the dense choice after each prefix is that of one forward over all of them."""
    run = spec(context=384, samples=1, batch=1, prefill_chunk=256)
    backend = hf.HFBackend(run, 60)
    prose = Prose(backend.tokenizer, bundled.evaluation_text())
    from pikv_ds.launch.evaluation.agreement import _dense
    from pikv_ds.launch.evaluation.ppl import windows_of

    ids = windows_of(run, prose, 0)[:, : run.context - CHOSEN]
    with torch.no_grad():
        chosen, _ = _dense(backend, run, ids, 0)
        whole = backend.model(torch.cat([ids, chosen], 1)).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
    assert chosen[0].equal(whole)


def test_all_tasks_make_rows(tmp_path):
    block = json.dumps({"compression": {"method": "int8"}})
    found = rows(tmp_path, "--tasks", "agreement,passkey,retrieval", "--prefill-chunk", "256", "--config", block)
    assert found["int8", "agreement"]["detail"]["agreement"] > 0.9 and found["dense", "agreement"]["detail"]["agreement"] == 1.0
    for task in ("passkey", "retrieval"):
        assert 0 <= found["int8", task]["recall"] <= 1 and sum(n for _, n in found["int8", task]["detail"]["found_by_depth"]) == 2


def test_caches_of_others_stand_beside(tmp_path):
    found = rows(tmp_path, "--tasks", "ppl", "--scored", "64", "--baseline", "fp8", "--prefill-chunk", "256")
    other = found["QuantizedCache fp8", "ppl"]
    assert list(found) == [("dense", "ppl"), ("exact", "ppl"), ("QuantizedCache fp8", "ppl")]
    assert other["kl"] > 1e-6 and other["config"] == {"cache": "QuantizedCache fp8", "package": None}
    assert other["ppl_change_pct"] != 0 and "Layer + sdpa" in other["attention_impl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--baseline", "kvpress:other:0.5"], "legal is kvpress:NAME:SHARE"),
        (["--baseline", "kvpress:snapkv:2"], "SHARE kept in (0, 1]"),
        (["--baseline", "hqq:5"], "--baseline 'hqq:5': legal are quanto:4"),
        (["--baseline", "fp8", "--ranks", "2"], "they run on one rank of --backend hf"),
        (["--prefill-chunk", "0"], "--prefill-chunk 0: legal is 1 or more"),
        (["--context", "256", "--tasks", "agreement"], "use 257 or more"),
    ],
)
def test_mistakes_are_told(words, message, capsys):
    assert main(["eval", *SMALL, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch):
    from pikv_ds.errors import ConfigError
    from pikv_ds.launch.evaluation import others

    monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: None)
    for other, package in ((Press("snapkv", 0.5), "kvpress"), (Quantized(HFCacheKind.parse("hqq:4")), "hqq")):
        with pytest.raises(ConfigError, match=f"needs the package {package}"):
            other.check()
    parse_other("fp8").check()


def test_a_prompt_that_comes_in_one_forward_begins_with_an_empty_cache():
    model, _ = bundled.load()
    session = hf.DenseSession(model)
    assert session.memory()[:2] == (0, 0)
    session.feed(torch.tensor([[1, 2, 3]]))
    assert session.memory()[:2] == (3 * 2048, 3 * 2048)


def test_presses_of_kvpress_take_whole_prompts(tmp_path):
    pytest.importorskip("kvpress", reason="kvpress is not installed")
    found = rows(tmp_path, "--tasks", "recall", "--baseline", "kvpress:snapkv:0.5")
    pressed = found["kvpress snapkv 0.5", "recall"]
    assert pressed["config"]["package"].startswith("kvpress ") and pressed["entries_read"] is None
    assert 0.45 < pressed["bytes_per_token"] / found["dense", "recall"]["bytes_per_token"] < 0.6
