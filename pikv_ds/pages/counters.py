"""Entry counters of one rank: device tensors, added to in place, read when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.errors import CapacityError
from pikv_ds.placement.placement import Hashed, Routed

PENDING_TOKENS = 4096  # counted in one go on the CPU: a decode step of a model adds a few per layer


class Counters:
    """appended + forked + loaded + copied = live + expired + evicted + cropped, summed over the ranks of the group; forked is 0 without
    beam search, loaded without copies of rows (pikv_ds/sessions), copied without copies of shards: what a copy holds counts where it lies.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._by_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self._pending: list[tuple[Routed | Hashed | Tensor, Tensor]] = []
        self._pending_tokens = 0
        self._kept_tokens = PENDING_TOKENS if device.type == "cpu" else 1
        self.device_counts = torch.zeros(3, dtype=torch.int64, device=device)  # expired, spilled to here, spilled anywhere
        self.clear()

    def clear(self) -> None:
        self._by_expert.zero_()
        self._pending.clear()
        self._pending_tokens = 0
        self.device_counts.zero_()
        self.evicted: int | Tensor = 0
        self.cropped = 0
        self.loaded = 0  # entries that a copy of rows brought
        self.copied = 0  # entries that copies of shards brought to this rank's tables, less those that left with shards
        self.forked = 0  # entries that beam forks added to this rank's tables, less those they dropped; sums to 0 over the ranks

    def keep_nothing(self) -> None:
        """From now on what is counted is added up at once: a step that is recorded writes the next one's into the same tensors."""
        self._kept_tokens = 1
        self._add_up()

    @property
    def by_expert(self) -> Tensor:
        """[E] int64, entries appended here, by primary expert. Sync: none."""
        self._add_up()
        return self._by_expert

    @property
    def nbytes(self) -> int:
        """Bytes of the counters, once what is pending has been added up."""
        return self.by_expert.nbytes + self.device_counts.nbytes

    def count_appended(self, experts: Routed | Hashed | Tensor, stored: Tensor) -> None:
        """experts: of N tokens; stored: [N] bool, which of them count. Sync: none.

        On the CPU both are kept for a while and must not change any more. On a device they are added up now: a graph that is replayed, or
        a model that reuses its buffers, writes the next step's into the same tensors.
        """
        self._pending.append((experts, stored))
        self._pending_tokens += stored.numel()
        if self._pending_tokens >= self._kept_tokens:
            self._add_up()

    def _add_up(self) -> None:
        """Add up what is pending: one reduction for all layers and steps in it, not one each."""
        pending, self._pending, self._pending_tokens = self._pending, [], 0
        routed = [(choice, stored) for choice, stored in pending if isinstance(choice, Routed)]
        for width in {choice.ids.shape[-1] for choice, _ in routed}:
            same = [(choice, stored) for choice, stored in routed if choice.ids.shape[-1] == width]
            choice = Routed(torch.cat([c.ids for c, _ in same]), torch.cat([c.weights for c, _ in same]))
            self._by_expert.index_add_(0, choice.primary(), torch.cat([stored for _, stored in same]).to(torch.int64))
        hashed = [(experts, stored) for experts, stored in pending if isinstance(experts, Hashed)]
        if hashed:
            experts = Hashed(torch.cat([each.positions for each, _ in hashed]), hashed[0][0].num_experts)
            self._by_expert.index_add_(0, experts.primary(), torch.cat([stored for _, stored in hashed]).to(torch.int64))
        known = [(experts, stored) for experts, stored in pending if isinstance(experts, Tensor)]
        if known:
            ids, stored = (torch.cat(each) for each in zip(*known, strict=True))
            self._by_expert.index_add_(0, ids, stored.to(torch.int64))

    def expire_at_birth(self, unseen: Tensor, experts: Tensor) -> None:
        """Tokens of a chunk longer than the window: appended and expired in one, at the home they would have had."""
        unseen = unseen.to(torch.int64)
        self._by_expert.index_add_(0, experts, unseen)
        self.device_counts[0] += unseen.sum()

    def expire(self, entries: Tensor) -> None:
        """0-d int64, that have left a window. Sync: none."""
        self.device_counts[0] += entries

    def evict(self, entries: Tensor) -> None:
        """0-d int64, that a budget has taken. Sync: none."""
        self.evicted += int(entries) if entries.device.type == "cpu" else entries

    def count_spilled(self, over: Tensor, here: Tensor) -> None:
        self.device_counts[1] += here.sum()
        self.device_counts[2] += over.sum()

    @staticmethod
    def raise_if_overflowed(spilled: int, capacity: list[int]) -> None:
        """spilled: entries, anywhere."""
        if spilled:
            raise CapacityError(
                f"{spilled} entries did not fit into the shard of their expert (pikv.storage.capacity_tokens: {max(capacity)} entries per "
                f"layer and shard) and pikv.storage.overflow = 'error'; raise capacity_tokens, or set overflow = 'spill'"
            )
