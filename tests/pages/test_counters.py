"""Counters of entries: kept for a while on the CPU, added up at once where a replayed graph writes into the same tensors again."""

import torch

from pikv_ds.pages.counters import Counters
from pikv_ds.placement.placement import Routed


def test_on_the_cpu_a_step_adds_nothing_up():
    counters = Counters(4, torch.device("cpu"))
    counters.count_appended(torch.tensor([1, 3]), torch.tensor([True, False]))
    assert len(counters._pending) == 1 and counters.by_expert.tolist() == [0, 1, 0, 0] and not counters._pending


def test_on_a_device_nothing_is_kept():
    counters = Counters(4, torch.device("meta"))
    stored = torch.ones(2, dtype=torch.bool, device="meta")
    counters.count_appended(Routed(torch.zeros(2, 2, dtype=torch.int64, device="meta"), torch.zeros(2, 2, device="meta")), stored)
    counters.count_appended(torch.zeros(2, dtype=torch.int64, device="meta"), stored)
    assert not counters._pending
