"""Caches on G simulated ranks that run the same requests, or each its own, beside one reference; a forward of all of them.

A source is who brings a request: with replicated requests there is one, which all ranks run; with distinct ones every rank is one. Rows are
numbered within their source, as LocalStep numbers them, and over all sources in the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor

from pikv_ds.cache import PiKVCache
from pikv_ds.cache import cache as cache_module
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.config import PiKVConfig
from pikv_ds.ops import merge_partials, sdpa_lse
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep
from tests.harness.driver import layer, ragged
from tests.harness.parking import Source
from tests.migration.simulated import Network, Seat, SimulatedExchange, run_ranks
from tests.reference_cache import wanted_shard

from .reference import ModelReference

HEADS, EXPERTS, SHARDS, TOLERANCE = 4, 8, 4, 1e-5
SINKS, RECENT = 2, 6
FLAVOURS = ("parks", "windows", "evicts")
"""What a cache has besides full attention: rows that are parked, a window layer, a budget. Parking combines with neither of the others."""

Tokens = list[tuple[Tensor, Tensor]]


@dataclass(kw_only=True)
class Row:
    """k, v of every token, by layer: what a dense cache would hold."""

    history: list[Tokens]

    @property
    def length(self) -> int:
        return len(self.history[0])

    def cut(self, keep: int) -> Row:
        return Row(history=[tokens[:keep] for tokens in self.history])


@dataclass(kw_only=True)
class Change:
    """Of one source: the rows of the next forward, (parent, tokens kept of it), and what is parked from then on; None: what is."""

    rows: list[Source]
    park: list[Source] | None = None


@dataclass(kw_only=True)
class World:
    size: int
    requests: str
    flavour: str
    page_size: int
    placement: str
    seed: int
    network: Network = field(init=False, repr=False)
    caches: list[PiKVCache] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        full = layer(0)
        self.layers = [full, layer(1, window=7)] if self.flavour != "parks" else [full, layer(1, latent=True)]
        self.budget = 32 if self.flavour == "evicts" else None
        self.generator = torch.Generator().manual_seed(self.seed)
        rule = {"num_experts": EXPERTS, "num_shards": SHARDS, "n_tok": 4}
        self.reference = ModelReference(
            self.layers, lambda *entry: wanted_shard(self.placement, *entry, **rule), num_shards=SHARDS, page_size=self.page_size,
        )  # fmt: skip
        self.build(self.size)

    def build(self, size: int) -> None:
        """New caches on a new group: nothing is stored."""
        self.size, self.network = size, Network(size)
        self.rows: list[list[Row]] = [[] for _ in range(self.num_sources)]
        self.parked: list[list[Row]] = [[] for _ in range(self.num_sources)]
        self.reference.restart(0)
        self.broken, self.moving = False, False
        block = {"page_size": self.page_size, "storage": {"requests": self.requests, "num_shards": SHARDS, "placement": self.placement}}
        if self.placement == "xor":
            block["storage"]["n_tok"] = 4
        if self.budget is not None:
            block["scheduling"] = {
                "method": "streaming_llm", "budget_tokens": self.budget, "sink_tokens": SINKS, "recent_tokens": RECENT, "prefill": "evict",
            }  # fmt: skip
        config = PiKVConfig(**block)

        def made(rank: int) -> PiKVCache:
            return PiKVCache(
                self.layers, config, num_experts=EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=Seat(self.network, rank)
            )

        with patch.object(cache_module, "Exchange", SimulatedExchange):
            self.caches = [made(rank) for rank in range(size)]  # in turns: CPython 3.11's ast.parse is not for several threads at once
        self.probes = [CacheProbe(cache) for cache in self.caches]

    @property
    def distinct(self) -> bool:
        return self.requests == "distinct" and self.size > 1

    @property
    def num_sources(self) -> int:
        return self.size if self.distinct else 1

    @property
    def fresh(self) -> bool:
        return not any(self.rows)

    @property
    def longest(self) -> int:
        return max((row.length for rows in self.rows for row in rows), default=0)

    def on_ranks(self, work) -> list:
        """work(rank) on all of them at once. Raises what one of them raised."""
        ended = run_ranks(self.network, work)
        for one in ended:
            if isinstance(one, BaseException):
                raise one
        return ended

    def home(self, shard: int) -> int:
        return self.caches[0].map.home(shard)

    # ---- a forward -------------------------------------------------------------------------------------------------------------

    def forward(self, num_new: list[list[int]], changes: list[Change] | None = None, *, left: bool = True) -> None:
        """num_new: tokens of every row of every source, after its change. Answers are compared with the reference, and with each other."""
        steps = self.prepared(num_new, changes, left)
        self.settle(self.on_ranks(lambda rank: self.run(rank, steps[rank])))

    def prepared(self, num_new: list[list[int]], changes: list[Change] | None, left: bool = True) -> list[tuple]:
        """Per rank its part of the forward. The reference and the rows are moved on: it is not to be prepared twice."""
        fresh = self._change(changes)
        masks = [ragged(new, left) for new in num_new]
        self.asked = self._drawn(masks)
        counts = [new for own in num_new for new in own]
        self.reference.begin(counts, decode=max(mask.shape[1] for mask in masks) == 1)
        self.positions = [self._positions(rows, mask) for rows, mask in zip(self.rows, masks, strict=True)]
        return [self._step(rank, num_new, changes, fresh) for rank in range(self.size)]

    def _change(self, changes: list[Change] | None) -> list[bool]:
        """Rows as they will be. Returns per source whether all of its rows are new."""
        if changes is None:
            return [False] * self.num_sources
        before = [len(rows) for rows in self.rows]
        held = [[*rows, *parked] for rows, parked in zip(self.rows, self.parked, strict=True)]
        total, rows, stay = sum(before), [], []
        first_row, first_parked = 0, 0
        for source, change in enumerate(changes):
            own, parked = before[source], len(self.parked[source])
            park = change.park
            if park is None:
                park = [(own + i, row.length) for i, row in enumerate(self.parked[source])]

            def number(parent: int, own=own, first_row=first_row, first_parked=first_parked) -> int:
                return -1 if parent < 0 else first_row + parent if parent < own else total + first_parked + parent - own

            rows += [(number(parent), keep) for parent, keep in change.rows]
            stay += [(number(parent), keep) for parent, keep in park]
            empty = Row(history=[[] for _ in self.layers])
            self.rows[source] = [held[source][parent].cut(keep) if parent >= 0 else empty.cut(0) for parent, keep in change.rows]
            self.parked[source] = [held[source][parent].cut(keep) for parent, keep in park]
            first_row, first_parked = first_row + own, first_parked + parked
        if all(parent < 0 for parent, _ in rows) and not stay:
            self.reference.restart(len(rows))
        else:
            self.reference.change(rows, stay)
        return [all(parent < 0 for parent, _ in change.rows) for change in changes]

    def _drawn(self, masks: list[Tensor]) -> list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """[source][layer] q, k, v, expert ids; noted in the rows and in the reference."""
        found = [[self._drawn_layer(spec, mask) for spec in self.layers] for mask in masks]
        for i in range(len(self.layers)):
            number = 0
            for source, mask in enumerate(masks):
                _, k, v, ids = found[source][i]
                for row, columns in enumerate(mask):
                    state = self.rows[source][row]
                    for column in columns.nonzero().flatten().tolist():
                        token = k[row, column], v[row, column]
                        expert = int(ids.view(mask.shape)[row, column])
                        self.reference.append(i, number, len(state.history[i]), expert, *token)
                        state.history[i].append(token)
                    number += 1
        return found

    def _drawn_layer(self, spec: LayerSpec, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        widths = (HEADS, spec.k_dim), (spec.num_kv_heads, spec.k_dim), (spec.num_kv_heads, spec.v_dim)
        q, k, v = (torch.randn(*mask.shape, *width, generator=self.generator) for width in widths)
        ids = torch.randint(EXPERTS, (mask.numel(),), generator=self.generator)
        ids = ids * (torch.rand(ids.shape, generator=self.generator) < 0.6)  # expert 0 is hot, so that shards spill
        return q, k, k[..., : spec.v_dim] if spec.latent else v, ids

    @staticmethod
    def _positions(rows: list[Row], mask: Tensor) -> Tensor:
        """[B, T] int64 of the tokens that rows have just got, -1 = padding."""
        before = torch.tensor([row.length for row in rows]) - mask.sum(1)
        return torch.where(mask, before.unsqueeze(1) + mask.cumsum(1) - 1, -1)

    def _step(self, rank: int, num_new: list[list[int]], changes: list[Change] | None, fresh: list[bool]) -> tuple:
        source = rank if self.distinct else 0
        rows, new, positions = self.rows[source], num_new[source], self.positions[source]
        change = None if changes is None else changes[source]
        local = LocalStep(
            num_rows=len(rows), num_columns=positions.shape[1], num_new=list(new),
            parent=list(range(len(rows))) if change is None else [parent for parent, _ in change.rows],
            keep=[row.length - n for row, n in zip(rows, new, strict=True)], positions=positions.to(torch.int32), digest=len(rows),
            identity=change is None, fresh=fresh[source], park=None if change is None else change.park,
        )  # fmt: skip
        return local, positions, self.asked[source]

    def run(self, rank: int, prepared: tuple) -> list[tuple[Tensor, Tensor]]:
        """One rank's forward: out, lse of every layer."""
        (local, positions, asked), cache = prepared, self.caches[rank]
        cache.begin_step(local)
        found = [self._attend(cache, i, positions, *asked[i]) for i in range(len(self.layers))]
        cache.end_step()
        return found

    def _attend(self, cache: PiKVCache, i: int, positions: Tensor, q: Tensor, k: Tensor, v: Tensor, ids: Tensor):
        spec, padding, scale = self.layers[i], (positions < 0)[..., None, None], q.shape[-1] ** -0.5
        given_k, given_v = k.masked_fill(padding, torch.nan), v.masked_fill(padding, torch.nan)[..., : spec.stored_v_dim]
        partial = cache.attend(i, q, given_k, given_v, scale=scale, v_dim=spec.v_dim, expert_ids=ids)
        if partial.includes_self:
            return partial.out, partial.lse
        at, of = positions.unsqueeze(2), positions.unsqueeze(1)
        visible = (of >= 0) & (of <= at) & (of > at - (spec.window or 10**6))
        own, own_lse = sdpa_lse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, mask=visible.unsqueeze(1))
        return merge_partials(torch.stack([partial.out, own.transpose(1, 2)]), torch.stack([partial.lse, own_lse.transpose(1, 2)]))

    def settle(self, answers: list[list[tuple[Tensor, Tensor]]]) -> None:
        """Compare the answers of all ranks; then let the reference end its forward."""
        from .checks import check_answers

        for i in range(len(self.layers)):
            check_answers(self, i, [of_rank[i] for of_rank in answers])
            self.reference.place(i)
        self.reference.expire()
        if self.budget is not None:
            self.reference.take_over(self.held, budget=self.budget, sinks=SINKS, recent=RECENT)
        self.moving = self.caches[0].migration.wanted is not None

    def held(self, i: int, row: int, shard: int) -> list[int]:
        probe = self.probes[self.home(shard)]
        return probe.near_pool(i).positions(row, probe.local_shards.index(shard))
