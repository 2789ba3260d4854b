"""What every rank knows about the homes of all entries, derived from the gathered expert ids alone. L layers, R rows, S shards, H tables
of a row and shard (one, or one per KV head)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pikv_ds.spec import LayerSpec


class Directory:
    """The shard of every position of every row, per layer, and how many visible entries each shard holds.

    It is the same on all ranks: spill decisions, crops and forks need no message. int16 per token and layer, on the device;
    reported as metadata, not as KV bytes. With one shard it stores no homes.
    """

    def __init__(
        self, layers: list[LayerSpec], num_shards: int, device: torch.device, heads: int = 1, moved: Callable[[], None] = lambda: None
    ) -> None:
        """heads: tables of a row and shard. A token is then as many entries, which a budget takes out one by one. moved: called when a
        tensor of it is replaced."""
        self._moved = moved
        self.layers, self.heads = layers, heads
        self.num_shards = num_shards
        self.device = device
        self.load = torch.zeros(len(layers), num_shards, dtype=torch.int64, device=device)  # entries inside the window
        self.evicted = torch.zeros(len(layers), 0, num_shards * heads, dtype=torch.int64, device=device)  # [L, R, S * H] taken by a budget
        self.shard_at: list[Tensor] = []
        self.reset(0)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.load, self.evicted, self._parked_evicted, *self.shard_at, *self._parked))

    def reset(self, num_rows: int) -> None:
        self._moved()
        self.load.zero_()
        self.evicted = self.evicted.new_zeros(len(self.layers), num_rows, self.num_shards * self.heads)
        self.shard_at = [torch.zeros(num_rows, 0, dtype=torch.int16, device=self.device) for _ in self.layers]
        self._parked, self._parked_evicted = [x[:0].clone() for x in self.shard_at], self.evicted[:, :0].clone()

    def reserve(self, length: int) -> None:
        """Make room for positions 0..length-1. Host side."""
        if self.num_shards > 1 and length >= self.shard_at[0].shape[1]:  # one spare column takes the writes of padding
            self._moved()
            grown = max(length + 1, 64) + length // 2
            self.shard_at = [torch.nn.functional.pad(t, (0, grown - t.shape[1])) for t in self.shard_at]

    def leave(self, layer: int, rows: Tensor, positions: Tensor, valid: Tensor, before: Tensor, after: Tensor, one_per_row: bool) -> None:
        """Take out of the load what this forward pushes out of the window: it must not keep new entries from their shards.

        Args: rows [N] int64; positions [N] int; valid [N] bool; before, after [R] int64 tokens of every row. Sync: none.
        """
        window = self.layers[layer].window
        if window is None:
            return
        homes, load = self.shard_at[layer], self.load[layer]
        if not one_per_row:
            load.copy_(self._count(homes, after - (window - 1), before))
        elif window > 1:  # with a window of 1 the entry leaves with the forward that brings it
            leaving = positions.to(torch.int64) - (window - 1)
            gone = valid & (leaving >= 0)
            shard = homes.view(-1)[rows * homes.shape[1] + leaving.clamp_min(0)].to(torch.int64)
            load.index_add_(0, shard, -gone.to(torch.int64))

    def note(self, layer: int, rows: Tensor, positions: Tensor, valid: Tensor, shard: Tensor) -> None:
        """The homes of new entries, before `record` counts them with those of the other ranks. Arguments as there. Sync: none."""
        homes = self.shard_at[layer]
        cell = rows * homes.shape[1] + torch.where(valid, positions.to(torch.int64), homes.shape[1] - 1)
        homes.view(-1).index_put_((cell,), torch.where(valid, shard, 0).to(torch.int16))

    def record(self, layer: int, rows: Tensor, positions: Tensor, valid: Tensor, shard: Tensor, lens: Tensor) -> None:
        """Note the homes of new entries, after `leave`.

        Args: rows, shard [N] int64; positions [N] int; valid [N] bool; lens [R] int64 after this step.
        Sync: none.
        """
        homes, window = self.shard_at[layer], self.layers[layer].window
        capacity = homes.shape[1]
        cell = rows * capacity + torch.where(valid, positions.to(torch.int64), capacity - 1)
        homes.view(-1).index_put_((cell,), torch.where(valid, shard, 0).to(torch.int16))
        seen = valid if window is None else valid & (positions > (lens - window)[rows])
        self.load[layer].index_add_(0, shard.clamp_min(0), seen.to(torch.int64) * self.heads)

    def evict(self, layer: int, entries: Tensor) -> None:
        """Take evicted entries out of the load; `shard_at` still names the last home of their positions. Host phase.

        Args: entries [R, S * H] int64, entries that left each table: shard * H + head, H = 1 when heads share tables.
        """
        self.load[layer] -= self._by_shard(entries.sum(0))
        self.evicted[layer] += entries

    def evicted_by_head(self) -> list[list[list[int]]]:
        """[L][R][H] entries of each row that a budget has taken, in all shards. Host phase."""
        return self.evicted.unflatten(-1, (self.num_shards, self.heads)).sum(2).tolist()

    def _by_shard(self, tables: Tensor) -> Tensor:
        return tables.view(self.num_shards, self.heads).sum(-1)

    def _count(self, homes: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        return self.per_row(homes, start, stop).sum(0)

    def per_row(self, homes: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Tokens of each row with start <= position < stop, per shard: [R, S] int64."""
        position = torch.arange(homes.shape[1], device=homes.device)
        inside = (position >= start.unsqueeze(-1)) & (position < stop.unsqueeze(-1))
        counts = torch.zeros(homes.shape[0], self.num_shards, dtype=torch.int64, device=homes.device)
        return counts.scatter_add_(1, homes.to(torch.int64), inside.to(torch.int64))

    def fork(self, parent: Tensor, keep: Tensor, lens: Tensor) -> list[Tensor]:
        """Fork rows: new row i continues row parent[i] up to position keep[i]. Host phase.

        Args: parent [R'] int64, -1 = fresh (keep 0); keep [R'] int64; lens [R] int64 before.
        Returns: per layer, [R', S] int64: tokens of each parent's shard at positions >= keep (what a crop removes).
        """
        self._moved()
        source = parent.clamp_min(0)
        if self.evicted.shape[1]:
            self.evicted = torch.where((parent >= 0)[:, None], self.evicted[:, source], 0)
        else:
            self.evicted = self.evicted.new_zeros(len(self.layers), parent.numel(), self.num_shards * self.heads)
        stop = torch.where(parent >= 0, lens[source], 0) if lens.numel() else torch.zeros_like(parent)
        if self.num_shards == 1:
            return [(stop - keep).unsqueeze(-1) for _ in self.layers]
        removed = []
        for i, spec in enumerate(self.layers):
            old = self.shard_at[i]
            homes = old[source] if old.shape[0] else old.new_zeros(parent.numel(), old.shape[1])
            removed.append(self.per_row(homes, keep, stop))
            self.shard_at[i] = homes
            start = torch.zeros_like(keep) if spec.window is None else keep - (spec.window - 1)
            self.load[i] = self._count(homes, start, keep) * self.heads - self._by_shard(self.evicted[i].sum(0))
        return removed

    def copied(self, lens: list[int]) -> tuple[Tensor | None, Tensor]:
        """homes [L, R, longest] int16 of rows of `lens` tokens, None with one shard; and evicted [L, R, S * H]. Copies."""
        if self.num_shards == 1:
            return None, self.evicted.clone()
        longest = torch.arange(max(lens, default=0), device=self.device) < torch.tensor(lens, device=self.device).unsqueeze(1)
        homes = [x[:, : longest.shape[1]].masked_fill(~longest, 0) for x in self.shard_at]
        return torch.stack(homes), self.evicted.clone()

    def put(self, lens: list[int], homes: Tensor | None, evicted: Tensor) -> None:
        """Rows of a copy take the place of as many new ones. Host phase."""
        self._moved()
        self.evicted = evicted.clone()
        if homes is None:
            return
        self.reserve(homes.shape[2])
        stop = torch.tensor(lens, dtype=torch.int64).to(self.device)
        for i, spec in enumerate(self.layers):
            self.shard_at[i][:, : homes.shape[2]] = homes[i]
            start = torch.zeros_like(stop) if spec.window is None else stop - (spec.window - 1)
            self.load[i] = self._count(self.shard_at[i], start, stop) * self.heads - self._by_shard(self.evicted[i].sum(0))

    def join(self) -> None:
        """Parked rows stand behind the others (pages/parked.py); the load is that of the active rows alone."""
        if self._parked_evicted.shape[1]:
            self.evicted = torch.cat([self.evicted, self._parked_evicted], 1)
            width = max(self._parked[0].shape[1], self.shard_at[0].shape[1])
            pairs = zip(self.shard_at, self._parked, strict=True)
            self.shard_at = [torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in pair]) for pair in pairs]

    def split(self, active: int, keep: list[int] | None) -> None:
        """The first `active` rows are active. keep: tokens of every row after a fork, whose load is that of all; None: of these alone."""
        self.evicted, self._parked_evicted = self.evicted[:, :active].clone(), self.evicted[:, active:].clone()
        width = 0 if keep is None else max(keep[active:], default=0)
        width = width or self.shard_at[0].shape[1]
        self._parked = [x[active:, :width].clone() for x in self.shard_at]
        self.shard_at = [x[:active].clone() for x in self.shard_at]
        if keep is None or self.num_shards == 1 or active == len(keep):
            return
        stop = torch.tensor(keep[active:], dtype=torch.int64).to(self.device)
        for i, spec in enumerate(self.layers):
            start = torch.zeros_like(stop) if spec.window is None else stop - (spec.window - 1)
            parked = self._count(self._parked[i], start, stop) * self.heads - self._by_shard(self._parked_evicted[i].sum(0))
            self.load[i] -= parked
