"""Every row of docs/reference/modes.md: the same as plain transformers, or refused by name."""

import copy

import pytest
import torch

import pikv_ds
from pikv_ds.errors import UnsupportedError
from tests.held import paths
from tests.long_form import LONG, short_or_long
from tests.tiny_models import prompt, tiny_model

from .modes import ROWS, Row


@pytest.mark.parametrize("row", [row for row in ROWS if LONG or not row.long], ids=lambda row: row.mode)
@pytest.mark.filterwarnings("ignore")
def test_mode(row: Row):
    model = tiny_model(row.family)
    plain = (row.oracle or row.run)(copy.deepcopy(model)) if row.refused is None else {}
    with pikv_ds.attach(model, {"page_size": 4}):
        if row.refused is not None:
            with pytest.raises(UnsupportedError, match=row.refused):
                row.run(model)
            return
        got = row.run(model)
    assert got.keys() == plain.keys()
    for name, want in plain.items():
        off = float((got[name] - want).abs().max()) / max(1.0, float(want.abs().max()))
        assert off <= row.tolerance, f"{name}: off by {off:.2g}"


@pytest.mark.parametrize("block", [{}, {"storage": {"num_shards": 4}}, {"scheduling": {"method": "h2o", "budget_tokens": 96}}], ids=str)
def test_inference_mode_around_anything(block):
    """attach, a turn, reset and detach, each inside and outside: the cache keeps no inference tensor, and goes on."""
    model, ids = tiny_model("gpt_oss"), prompt(9, seed=2)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
    modes = (torch.inference_mode, torch.no_grad)
    for bits in short_or_long([1, 6, 8, 15], list(range(16))):
        attach, turn, reset, detach = (modes[bits >> i & 1] for i in range(4))
        with attach():
            cache = pikv_ds.attach(model, {"page_size": 4} | block)
        for mode in (turn, reset, turn):
            with mode():
                assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == expected
        kept = [path for path, tensor in paths(cache.core) if tensor.is_inference() and "ounters/list" not in path]  # those are only read
        assert not kept, kept
        with reset():
            cache.reset()
        with torch.inference_mode():
            given = ids.clone()
        assert model.generate(given, max_new_tokens=6, do_sample=False).tolist() == expected, "inputs may be inference tensors"
        with detach():
            cache.detach()


@pytest.mark.skipif(not LONG, reason="the long form: the compiler is imported, and traces the model")
def test_a_compiled_model_that_must_not_break_says_where():
    model = tiny_model("qwen3_moe")
    torch._dynamo.reset()
    with pikv_ds.attach(model, {"page_size": 4}), torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(prompt(9, seed=2))
    torch._dynamo.reset()
