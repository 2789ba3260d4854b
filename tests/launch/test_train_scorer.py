"""`pikv train eviction_scorer`: windows are read twice, and the file evicts pages of the model that it was trained for."""

import torch

from pikv_ds import attach, bundled
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.codecs.part_file import PartFile
from pikv_ds.launch.cli import main
from pikv_ds.launch.training.data import Tokens, repeated


def test_windows_are_read_twice():
    ids = torch.arange(10).view(2, 5)
    twice = repeated(Tokens(ids, torch.ones(2, 5, dtype=torch.bool)))
    assert twice.ids.tolist() == [[0, 1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 9, 6, 7, 8, 9]]
    assert twice.question.tolist() == [[False] * 5 + [True] * 4] * 2


def test_it_is_trained_and_evicts(tmp_path):
    out = tmp_path / "scorer.safetensors"
    small = ["--context", "96", "--samples", "6", "--steps", "30", "--every", "15", "--lr", "0.01", "--set", "hidden=8"]
    assert main(["train", "eviction_scorer", "--out", str(out), *small]) == 0
    file = PartFile.load(out, "eviction_scorer")
    assert (len(file.layers), file.options["hidden"], len(file.fingerprint)) == (4, 8, 4)
    model, _ = bundled.load()
    block = {"method": "learned_scores", "path": str(out), "budget_ratio": 0.5, "head_budget": "adaptive", "recent_tokens": 8}
    ids = torch.randint(5, 2000, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attach(model, {"page_size": 8, "scheduling": block}) as cache:
        model(ids, cache=cache)
        probe = CacheProbe(cache.core)
        kept = [[len(head) for head in row] for row in probe.kept(0)]
        assert all(sum(row) <= 2 * (48 + 7) and min(row) >= 12 for row in kept), kept
        assert probe.policy.name == "learned_scores" and cache.stats()["kv_bytes_allocated"] > 0
