"""Retrieval heads keep everything while streaming heads shrink to sinks and recent entries."""

import pytest
import torch
from safetensors.torch import save_file

from pikv_ds.errors import ConfigError
from tests.harness.driver import Driver, layer, ragged
from tests.harness.heads import HEADS, HeadAttention, HeadPages, held_by
from tests.harness.invariants import poison
from tests.retention.test_evict_heads import SMALL

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def block(folder, heads: list[list[float]], **more) -> dict:
    path = folder / "heads.safetensors"
    save_file({"heads": torch.tensor(heads)}, path)
    return {"method": "duo_heads", "path": str(path), "head_budget": "adaptive", "head_floor": 0.0, **SMALL} | more


def test_budget_goes_to_retrieval_heads(tmp_path):
    """Layer 0: head 1 retrieves, layer 1: head 0. 2 x 32 entries hold one head whole and the pins of the other, until 59 tokens."""
    kinds = {(0, 0): False, (0, 1): True, (1, 0): True, (1, 1): False}
    scheduling = block(tmp_path, [[0.1, 0.5], [0.9, 0.4]], budget_tokens=32)
    d = Driver([layer(0), layer(1)], page_size=1, checks=[HeadAttention(), HeadPages()], scheduling=scheduling)
    d.prefill([30, 12])
    for mask in [ragged([20, 4]), *[ragged([1, 1])] * 6, ragged([8, 0]), *[ragged([1, 1])] * 4]:
        poison(d)
        d.forward(mask)
        for row, n in enumerate(d.lens):
            every, excess = set(range(n)), max(0, 2 * n - 64)
            pins = {p for p in every if p < 2 or p >= n - 3}
            for i in range(2):
                held = {kinds[i, head]: set(held_by(d, i, row, head)) for head in range(HEADS)}
                assert len(held[False]) + len(held[True]) == 2 * n - excess
                if excess <= n - len(pins):
                    assert held[True] == every and held[False] >= pins, "a retrieval head lost entries before a streaming head was empty"
                    assert sorted(held[False] - pins) == sorted(every - pins)[excess:], "the oldest go first"
                else:
                    assert held[False] == pins and held[True] >= pins
    assert d.lens[0] > 59, "both cases occurred"


def test_refusals(tmp_path):
    for changed, said in [
        ({"head_budget": "shared"}, "legal is 'adaptive'"),
        ({"head_floor": 0.2}, "head_floor = 0.2.*legal is 0"),
        ({"path": str(tmp_path / "none")}, "readable safetensors file"),
    ]:
        with pytest.raises(ConfigError, match=said):
            Driver([layer(0)], scheduling=block(tmp_path, [[1.0, 0.0]], budget_tokens=40, **changed))
    for heads in ([[1.0, 0.0, 0.0]], [[1.0]]):
        with pytest.raises(ConfigError, match=f"with {len(heads[0])} KV heads; layer 0 of this model has 2"):
            Driver([layer(0)], scheduling=block(tmp_path, heads, budget_tokens=40))
