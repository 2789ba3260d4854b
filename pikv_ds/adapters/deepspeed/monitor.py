"""PiKV's numbers in DeepSpeed's monitor, as PiKV/<group>/<metric>."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pikv_ds.exchange.exchange import Exchange


class HasStats(Protocol):
    def stats(self) -> dict[str, Any]: ...


class MonitorWriter:
    """End-of-step callback: every `interval` steps, reduce stats() over the group and write them.

    Two collectives per write, made by every rank of the group: a frame, for ranks that are out of step, and the sum. DeepSpeed's monitor
    writes on global rank 0 only, so the group that is written is the one that rank 0 belongs to.
    """

    def __init__(
        self, monitor: Any, cache: HasStats, group: dist.ProcessGroup | None, group_name: str, interval: int, timeout_s: float = 300
    ) -> None:
        self._monitor, self._cache, self._group = monitor, cache, group
        self._device = torch.device(get_accelerator().current_device_name())
        self._exchange = Exchange(group, timeout_s, self._device)
        self._prefix, self._interval = f"PiKV/{group_name}", interval

    def __call__(self, step: int) -> None:
        if step % self._interval == 0:
            reduced = self._reduced()
            self._monitor.write_events([(f"{self._prefix}/{name}", value, step) for name, value in reduced.items()])

    def _reduced(self) -> dict[str, float]:
        per_rank = self._per_rank(scalars(self._cache.stats()))
        totals = {name: sum(values) for name, values in per_rank.items()}
        fullest = max(per_rank["kv_bytes_allocated"])
        mean = totals["kv_bytes_allocated"] / len(per_rank["kv_bytes_allocated"])
        return totals | {"kv_bytes_allocated_fullest": fullest, "fullest_over_mean": fullest / mean if mean else 1.0}

    def _per_rank(self, own: dict[str, float]) -> dict[str, list[float]]:
        if self._group is None:
            return {name: [value] for name, value in own.items()}
        # Each rank fills its own row of zeros: one sum gives all rows, from which totals and maxima follow.
        self._exchange.meet("writing numbers of the cache to DeepSpeed's monitor", len(own))
        table = torch.zeros(dist.get_world_size(self._group), len(own), dtype=torch.float64, device=self._device)
        table[dist.get_rank(self._group)] = torch.tensor(list(own.values()), dtype=torch.float64)
        dist.all_reduce(table, group=self._group)
        return dict(zip(own, table.T.tolist(), strict=True))


def scalars(stats: dict[str, Any]) -> dict[str, float]:
    """The entries of stats() that are one number of this rank.

    Lists per rank or expert and names are left out, and spilled_group: it is a total of the group already.
    """
    return {
        name: float(value)
        for name, value in stats.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "spilled_group"
    }
