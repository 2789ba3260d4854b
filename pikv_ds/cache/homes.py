"""Entries go home, with pikv.routing.exchange "routed": keys and values to the ranks that hold their shard, their expert ids to all.
N tokens of all ranks, n of this one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.pages.events import Written
from pikv_ds.step.step import Step

from .writer import Writer


class Placed(NamedTuple):
    """Where the new entries of a layer belong, the same on all ranks. [N] each."""

    experts: Tensor
    """int64."""
    valid: Tensor
    """bool, stored on whatever rank."""
    shard: Tensor
    """int64 global shard."""


class Homes:
    """What a Writer does in two steps: first where entries go, which all ranks must know, then the entries that came here."""

    def __init__(self, writer: Writer) -> None:
        self.writer, self.pages = writer, writer.pages

    def place_own(self, step: Step, layer: int, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """valid [n] bool and shard [n] int64 of this rank's entries, where none can spill; the directory is told. Sync: none."""
        own = slice(step.own * step.num_tokens, step.own * step.num_tokens + expert_ids.numel())
        positions, valid = step.positions[own], step.valid[own]
        window = self.pages.specs[layer].window
        if self._expires_at_birth(step, window):
            valid = valid & self.writer.stays(step, window)[own]
        experts = torch.where(expert_ids < 0, step.hashed_experts(self.writer.num_experts)[own], expert_ids)
        shard = self.writer.wanted(layer, experts, positions)
        self.pages.directory.note(layer, step.rows[own], positions, valid, shard)
        return valid, shard

    def place(self, step: Step, layer: int, expert_ids: Tensor) -> Placed:
        """Of all ranks' entries, in the directory as well. expert_ids [N] int64. Sync: none."""
        writer, pages, positions, valid = self.writer, self.pages, step.positions, step.valid
        experts = torch.where(expert_ids < 0, step.hashed_experts(writer.num_experts), expert_ids)
        window = pages.specs[layer].window
        if self._expires_at_birth(step, window):
            born = valid & writer.stays(step, window)
            pages.counters.expire_at_birth(valid & ~born & pages.map.is_local(writer.wanted(layer, experts, positions)), experts)
            valid = born
        pages.directory.leave(layer, step.rows, positions, valid, step.lens_before, step.lens_after, step.decode)
        shard = writer.shards(layer, step, experts, positions, valid)
        pages.directory.record(layer, step.rows, positions, valid, shard, step.lens_after)
        return Placed(experts, valid, shard)

    def store(self, step: Step, layer: int, placed: Placed, tokens: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Written]:
        """The entries that came here: tokens [E] int32 ascending, -1 = none there; k, v [E, Hkv, D].

        Returns: keys [N, Hkv, Dk] of all ranks' tokens, 0 of those that did not come here, and where these went. Sync: none.
        """
        slots = torch.full_like(step.positions, -1)
        keys = k.new_zeros(slots.numel(), *k.shape[1:])
        if tokens.numel():
            here, token = tokens >= 0, tokens.long()
            if tokens.numel() == placed.shard.numel():  # a place for every token, in order
                token = torch.arange(tokens.numel(), device=tokens.device)
            slots[token] = self.pages.layers[layer].nearest.append(
                step.rows[token], self.pages.map.index[placed.shard[token]].clamp_min(0), here, step.positions[token], k, v,
                one_per_row=step.decode, may_open=step.may_open[layer], all_valid=False,
            )  # fmt: skip
            self.pages.counters.count_appended(placed.experts[token], here)
            keys[token] = k.masked_fill(~here.view(-1, 1, 1), 0)
        here = slots >= 0
        return keys, Written(slots, placed.shard, placed.valid & here, here)

    def _expires_at_birth(self, step: Step, window: int | None) -> bool:
        return window is not None and not step.decode and not step.hold
