"""Kept entries are those of kvpress 0.5.5 (tests/kvpress/make_cases.py), through the store: one prompt, pages of one entry."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pikv_ds.cache import PiKVCache
from pikv_ds.config import PiKVConfig
from pikv_ds.plan import LocalStep
from pikv_ds.spec import LayerSpec
from tests.kvpress.inputs import HEAD_DIM, Case, digest, rotated, tensors
from tests.unit.invariants import slots_of

FILE = Path(__file__).parent / "kept.safetensors"


def load() -> tuple[list[tuple[Case, torch.Tensor]], int]:
    """(case, kept [Hkv, L] bool) and SnapKV's window."""
    with safe_open(FILE, "pt") as file:
        about, bits = file.metadata(), file.get_tensor("kept")
    cases = [Case(*case) for case in json.loads(about["cases"])]
    assert abs(digest(cases) - float(about["digest"])) < 1e-6, "torch draws other random numbers than when the cases were made"
    flat = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)).bitwise_and(1).flatten().bool()
    sizes = [case.num_kv_heads * case.length for case in cases]
    masks = flat[: sum(sizes)].split(sizes)
    return [(case, mask.view(case.num_kv_heads, -1)) for case, mask in zip(cases, masks, strict=True)], int(about["window"])


CASES, WINDOW = load()
# What kvpress always keeps, in our words.
PINS = {
    "knorm": {"sink_tokens": 0, "recent_tokens": 0},
    "streaming_llm": {"sink_tokens": 4, "recent_tokens": 0},
    "snapkv": {"sink_tokens": 0, "recent_tokens": WINDOW, "window": WINDOW},
    "tova": {"sink_tokens": 0, "recent_tokens": 1},
    "expected_attention": {"sink_tokens": 4, "recent_tokens": 0, "horizon": 64},
}


def kept(case: Case) -> torch.Tensor:
    """[Hkv, L] bool, after one forward of the whole prompt."""
    q, k, v = tensors(case)
    config = PiKVConfig(
        page_size=1, scheduling={"method": case.method, "budget_tokens": case.kept, "head_budget": case.heads, **PINS[case.method]}
    )
    spec = LayerSpec(layer_idx=0, num_kv_heads=case.num_kv_heads, k_dim=HEAD_DIM, v_dim=HEAD_DIM)
    cache = PiKVCache([spec], config, num_experts=1, dtype=torch.float32, device=torch.device("cpu"))
    positions = torch.arange(case.length, dtype=torch.int32).unsqueeze(0)
    new = {"num_new": [case.length], "parent": [-1], "keep": [0], "identity": False, "fresh": True}
    cache.begin_step(LocalStep(num_rows=1, num_columns=case.length, positions=positions, digest=0, **new))
    q, k, v = (x.unsqueeze(0) for x in (rotated(q), k, v))
    cache.attend(0, q, k, v, scale=HEAD_DIM**-0.5, v_dim=HEAD_DIM, expert_ids=None)
    cache.end_step()
    store, mask = cache.tables.stores[0], torch.zeros(case.num_kv_heads, case.length, dtype=torch.bool)
    for head in range(case.num_kv_heads):
        mask[head, store.positions.flatten()[slots_of(store, 0, head).long()].long()] = True
    return mask


@pytest.mark.parametrize("heads", ["shared", "uniform", "adaptive"])
@pytest.mark.parametrize("method", PINS)
def test_kept_entries(method: str, heads: str):
    chosen = [(case, mask) for case, mask in CASES if case.method == method and case.heads == heads]
    if not chosen:
        pytest.skip(f"{method} keeps the same entries for every head")
    wrong = [case for case, mask in chosen if not torch.equal(kept(case), mask)]
    print(f"{method}, {heads}: {len(chosen) - len(wrong)} of {len(chosen)} sets equal")
    assert len(wrong) <= len(chosen) // 1000, wrong[:3]
