"""Kept entries are those of kvpress 0.5.5 (tests/kvpress/make_cases.py), through the store: one prompt, pages of one entry."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep
from tests.kvpress.inputs import HEAD_DIM, Case, digest, rotated, tensors

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


def kept(case: Case, chunks: int) -> torch.Tensor:
    """[Hkv, L] bool, after one forward of the whole prompt, or after two: the second then attends to stored entries."""
    q, k, v = tensors(case)
    scheduling = {
        "method": case.method,
        "budget_tokens": case.kept,
        "head_budget": case.heads,
        "prefill": "keep",
    }
    config = PiKVConfig(page_size=1, scheduling=scheduling | PINS[case.method])
    spec = LayerSpec(layer_idx=0, num_kv_heads=case.num_kv_heads, k_dim=HEAD_DIM, v_dim=HEAD_DIM)
    cache = PiKVCache([spec], config, num_experts=1, dtype=torch.float32, device=torch.device("cpu"))
    q, positions = rotated(q), torch.arange(case.length, dtype=torch.int32)
    first = case.length if chunks == 1 else case.length - WINDOW - 3
    for begin, end in ((0, first), (first, case.length)):
        if begin == end:
            continue
        row = {"num_new": [end - begin], "parent": [0 if begin else -1], "keep": [begin], "identity": begin > 0, "fresh": not begin}
        own = [x[begin:end].unsqueeze(0) for x in (positions, q, k, v)]
        cache.begin_step(LocalStep(num_rows=1, num_columns=end - begin, positions=own[0], digest=0, **row))
        cache.attend(0, *own[1:], scale=HEAD_DIM**-0.5, v_dim=HEAD_DIM, expert_ids=None)
        cache.end_step()
    cache.retention.evict([case.length])
    pool, mask = CacheProbe(cache).near_pool(0), torch.zeros(case.num_kv_heads, case.length, dtype=torch.bool)
    for head in range(case.num_kv_heads):
        mask[head, pool.positions(0, head)] = True
    return mask


@pytest.mark.parametrize("heads", ["shared", "uniform", "adaptive"])
@pytest.mark.parametrize("method", PINS)
@pytest.mark.parametrize("chunks", [1, 2], ids="chunks{}".format)
def test_kept_entries(chunks: int, method: str, heads: str):
    chosen = [(case, mask) for case, mask in CASES if case.method == method and case.heads == heads]
    if not chosen:
        pytest.skip(f"{method} keeps the same entries for every head")
    wrong = [case for case, mask in chosen if not torch.equal(kept(case, chunks), mask)]
    print(f"{method}, {heads}, {chunks} forward(s): {len(chosen) - len(wrong)} of {len(chosen)} sets equal")
    assert len(wrong) <= len(chosen) // 1000, wrong[:3]
