"""The slow, obviously right cache: Python lists of entries, softmax in float64. What tests compare the real cache to.

One process plays G virtual ranks that hold S shards. Only tests import this file.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.placement.placement import Placement
from pikv_ds.spec import LayerSpec


class Entry(NamedTuple):
    """One token of one layer: k [Hkv, Dk], v [Hkv, Dv] as given; Dv is the width of the output, also in a latent layer."""

    position: int
    expert: int
    shard: int
    k: Tensor
    v: Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one query in float64: q [Hq, Dk], k [L, Hkv, Dk], v [L, Hkv, Dv] -> out [Hq, Dv], lse [Hq]; L = 0: 0 and -inf."""
    group = q.shape[0] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    if k.shape[0] == 0:
        return v.new_zeros(q.shape[0], v.shape[-1]), v.new_full((q.shape[0],), -torch.inf)
    scores = scale * torch.einsum("hd,lhd->hl", q.double(), k)
    return torch.einsum("hl,lhd->hd", scores.softmax(-1), v), scores.logsumexp(-1)


def merge(partials: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from (out [Hq, Dv], lse [Hq]) of each."""
    outs, lses = torch.stack([out for out, _ in partials]), torch.stack([lse for _, lse in partials])
    total = lses.logsumexp(0)
    weights = torch.where(total == -torch.inf, 0.0, torch.exp(lses - total))
    return (weights.unsqueeze(-1) * outs).sum(0), total


def wanted_shard(
    method: str, layer: int, expert: int, position: int, *, num_experts: int, num_shards: int, n_tok: int = 1, table: list | None = None
) -> int:
    """The shard an entry asks for, as placement.Placement defines it, in plain integers."""
    if method == "position":
        return position % num_shards
    if method == "experts":
        return expert * num_shards // num_experts
    if method == "xor":
        power = 1
        while power < num_experts:
            power *= 2
        return ((position % n_tok) ^ (expert % power)) % num_shards
    if method != "table":  # a rule of another distribution: its own word is all there is
        placed = Placement(method, num_experts, num_shards).shard_of(layer, torch.tensor([expert]), torch.tensor([position]))
        return int(placed)
    replicas = [shard for shard in table[layer if len(table) > 1 else 0][expert] if shard >= 0]
    return replicas[position % len(replicas)]


def spill(wanted: list[int], load: list[int], capacity: int) -> tuple[list[int], list[int]]:
    """Homes of new entries, and which of them did not fit.

    The shard each wants while it has room, in token order; the others fill the least loaded shards.

    Which shards take the others: one entry at a time to the lowest; on a tie to the one that was lower before, then to the lower index.
    The tokens themselves then go to those places in shard order.
    """
    level, homes, over = list(load), list(wanted), []
    for i, shard in enumerate(wanted):
        if level[shard] < capacity:
            level[shard] += 1
        else:
            over.append(i)
    filled = list(level)
    for _ in over:
        lowest = min(range(len(load)), key=lambda s: (filled[s], level[s], s))
        filled[lowest] += 1
    places = [s for s in range(len(load)) for _ in range(filled[s] - level[s])]
    for i, shard in zip(over, places, strict=True):
        homes[i] = shard
    return homes, over


class ReferenceCache:
    """Every entry of every (layer, row) in one list, in the order stored.

    Call order of a forward: begin(), append() for each token, place() per layer, expire(). Rows change with fork() and crop(), between
    forwards. `appended + forked = live + expired + cropped` holds as in counters.Counters.
    """

    def __init__(
        self,
        layers: list[LayerSpec],
        wanted: Callable[[int, int, int], int],
        *,
        num_shards: int,
        page_size: int,
        num_ranks: int = 1,
        capacity_tokens: int | None = None,
    ) -> None:
        """wanted(layer, expert, position) -> shard; capacity_tokens as storage.capacity_tokens."""
        self.layers, self.wanted = layers, wanted
        self.num_shards, self.page_size, self.num_ranks, self.capacity_tokens = num_shards, page_size, num_ranks, capacity_tokens
        self.restart(0)

    def restart(self, num_rows: int) -> None:
        self.rows: list[list[list[Entry]]] = [[[] for _ in range(num_rows)] for _ in self.layers]
        self.pending: list[list[tuple[int, Entry]]] = [[] for _ in self.layers]  # appended, not yet placed: (row, entry)
        self.lens = [0] * num_rows
        self.appended = self.expired = self.cropped = self.forked = self.spilled = 0

    def begin(self, num_new: list[int], *, decode: bool, hold: bool = False) -> None:
        """Announce the tokens each row gets. decode: one column, nothing expires at birth; hold: crops may follow, likewise."""
        self.lens = [n + new for n, new in zip(self.lens, num_new, strict=True)]
        self.keeps_all = decode or hold

    def append(self, layer: int, row: int, position: int, expert: int, k: Tensor, v: Tensor) -> None:
        self.pending[layer].append((row, Entry(position, expert, self.wanted(layer, expert, position), k, v)))
        self.appended += 1

    def capacity(self, layer: int) -> int:
        """Entries a shard may hold: ceil(1.1 x the balanced share of what stays visible) + one page, or the fixed number."""
        if self.capacity_tokens is not None:
            return self.capacity_tokens
        visible = sum(self.layers[layer].tokens_kept(n) for n in self.lens)
        return ceil(Fraction(11, 10) * visible / self.num_shards) + self.page_size

    def load(self, layer: int) -> list[int]:
        """Entries per shard that queries after this forward still see."""
        counts = [0] * self.num_shards
        for entries, length in zip(self.rows[layer], self.lens, strict=True):
            for entry in entries:
                counts[entry.shard] += entry.position >= length - self.layers[layer].tokens_kept(length)
        return counts

    def place(self, layer: int) -> None:
        """Send the appended entries of one layer home, in the order of the appends."""
        spec, waiting = self.layers[layer], self.pending[layer]
        self.pending[layer] = []
        if not self.keeps_all:
            born = [(row, e) for row, e in waiting if e.position >= self.lens[row] - spec.tokens_kept(self.lens[row])]
            self.expired += len(waiting) - len(born)
            waiting = born
        homes = [e.shard for _, e in waiting]
        if self.num_shards > 1:
            homes, over = spill(homes, self.load(layer), self.capacity(layer))
            self.spilled += len(over)
        for (row, entry), shard in zip(waiting, homes, strict=True):
            self.rows[layer][row].append(entry._replace(shard=shard))

    def shard_entries(self, layer: int, row: int, shard: int) -> list[Entry]:
        """What one shard holds of a row, in slot order: page p has the entries p * page_size ..."""
        return [entry for entry in self.rows[layer][row] if entry.shard == shard]

    def expire(self, margin: int = 0) -> None:
        """Drop leading pages, per row and shard, whose last entry no query after `lens - margin` tokens can see."""
        for spec, rows in zip(self.layers, self.rows, strict=True):
            for row, entries in enumerate(rows):
                for shard in range(self.num_shards if spec.window is not None else 0):
                    mine = [entry for entry in entries if entry.shard == shard]
                    while len(mine) >= self.page_size and mine[self.page_size - 1].position <= self.lens[row] - margin - spec.window:
                        gone = {entry.position for entry in mine[: self.page_size]}
                        mine = mine[self.page_size :]
                        entries[:] = [entry for entry in entries if entry.position not in gone]
                        self.expired += self.page_size

    def fork(self, parents: list[int]) -> None:
        """New row i continues row parents[i]; -1 = a new request. Rows without a child leave: cropped if new requests come, else forked."""
        ended = [r for r in range(len(self.lens)) if r not in parents] if -1 in parents else []
        for i, rows in enumerate(self.rows):
            before = sum(map(len, rows))
            cropped = sum(len(rows[r]) for r in ended)
            self.rows[i] = [list(rows[p]) if p >= 0 else [] for p in parents]
            self.cropped += cropped
            self.forked += sum(map(len, self.rows[i])) + cropped - before
        self.lens = [self.lens[p] if p >= 0 else 0 for p in parents]

    @property
    def held(self) -> list[list[list[Entry]]]:
        """[layer][row] entries of all rows."""
        return self.rows

    def crop(self, row: int, keep: int) -> None:
        """Remove the positions from `keep` on."""
        for rows in self.rows:
            kept = [entry for entry in rows[row] if entry.position < keep]
            self.cropped += len(rows[row]) - len(kept)
            rows[row] = kept
        self.lens[row] = keep

    def visible(self, layer: int, row: int, q_position: int, window: int | None) -> list[Entry]:
        entries = self.rows[layer][row] + [entry for r, entry in self.pending[layer] if r == row]
        return [e for e in entries if e.position <= q_position and (window is None or e.position > q_position - window)]

    def attend(self, layer: int, row: int, q: Tensor, q_position: int, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """q [Hq, Dk] -> out [Hq, Dv], lse [Hq], float64, over every visible entry, also those not yet placed."""
        return _over(self.visible(layer, row, q_position, window), q, scale, self.layers[layer])

    def partials(self, layer: int, row: int, q: Tensor, q_position: int, scale: float, window: int | None, *, by_rank: bool = False):
        """attend() per shard, or per rank, in that order: a list of (out, lse) over disjoint sets."""
        visible = self.visible(layer, row, q_position, window)
        of = [e.shard * self.num_ranks // self.num_shards if by_rank else e.shard for e in visible]
        sets = range(self.num_ranks if by_rank else self.num_shards)
        return [_over([e for e, at in zip(visible, of, strict=True) if at == s], q, scale, self.layers[layer]) for s in sets]


def _over(entries: list[Entry], q: Tensor, scale: float, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    k = torch.stack([e.k for e in entries]) if entries else q.new_zeros(0, spec.num_kv_heads, spec.k_dim)
    v = torch.stack([e.v for e in entries]) if entries else q.new_zeros(0, spec.num_kv_heads, spec.v_dim)
    return dense_attention(q, k, v, scale)
