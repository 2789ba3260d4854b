"""Rows of one cache beside each other, and each of them in a cache of its own: what a row keeps and reads is its own affair.

A token is a stream and a position: its q, k, v and expert follow from these, in whatever cache it is fed. So a row can be fed again alone,
in the same forwards, without the tokens that were taken back and without the rows that it was forked beside. D head_dim, Hq query heads.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.ops import merge_partials, sdpa_lse
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep

EXPERTS, QUERY_HEADS = 8, 4
LONGEST = 256  # positions that a stream has tokens for


class Token(NamedTuple):
    stream: int
    position: int


@dataclass
class Fed:
    """What one forward brought to a row, and what came back: outputs by layer, [tokens, Hq, D]."""

    tokens: list[Token]
    announced: bool
    """Some of it might have been taken back: what leaves windows and budgets waits."""
    out: list[Tensor] = field(default_factory=list)

    def first(self, n: int) -> Fed:
        return Fed(self.tokens[:n], self.announced, [x[:n] for x in self.out])


class Rows:
    """A cache, and the history of its rows. Row changes wait for the next forward, as the hosts' caches do it."""

    def __init__(self, layers: list[LayerSpec], config: dict, group=None) -> None:
        self.layers, self.config, self.group = layers, config, group
        block = PiKVConfig.model_validate(config)
        self.cache = PiKVCache(layers, block, num_experts=EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=group)
        self.probe = CacheProbe(self.cache)
        self.begin()

    def begin(self) -> None:
        self.rows: list[list[Fed]] = []
        self.parent: list[int] = []
        self.fresh, self.touched = True, False

    @property
    def lens(self) -> list[int]:
        return [sum(len(fed.tokens) for fed in row) for row in self.rows]

    # ---- what happens to rows ------------------------------------------------------------------------------------------------

    def select(self, index: list[int]) -> None:
        """Row i continues row index[i]."""
        self.touched |= index != list(range(len(self.rows)))
        self.parent, self.rows = [self.parent[i] for i in index], [list(self.rows[i]) for i in index]

    def crop(self, keep: list[int]) -> None:
        """Row i keeps its first keep[i] tokens."""
        self.touched |= keep != self.lens
        for row, n in enumerate(keep):
            left, kept = n, []
            for fed in self.rows[row]:
                kept += [fed.first(left)] if left > 0 else []
                left -= len(fed.tokens)
            self.rows[row] = kept
        self.cache.note_crop()

    def feed(self, streams: list[int], num_new: list[int]) -> None:
        """Row i goes on with num_new[i] tokens of a stream, padded on the left."""
        if self.fresh:
            self.rows, self.parent = [[] for _ in streams], [-1] * len(streams)
        lens = self.lens
        tokens = [[Token(s, n + i) for i in range(new)] for s, n, new in zip(streams, lens, num_new, strict=True)]
        width = max(num_new)
        positions = [[-1] * (width - len(row)) + [token.position for token in row] for row in tokens]
        self._forward(tokens, torch.tensor(positions, dtype=torch.int32).view(len(streams), width), lens)
        self.parent, self.fresh, self.touched = list(range(len(streams))), False, False

    def keep_step(self) -> None:
        """A forward that stores nothing, beside other ranks that go on."""
        self.feed([0] * len(self.rows), [0] * len(self.rows)) if self.rows else None

    def _forward(self, tokens: list[list[Token]], positions: Tensor, lens: list[int]) -> None:
        num_new, (num_rows, num_columns) = [len(row) for row in tokens], positions.shape
        self.cache.begin_step(
            LocalStep(
                num_rows=num_rows, num_columns=num_columns, num_new=num_new, parent=self.parent, keep=lens, positions=positions, digest=0,
                identity=not self.fresh and not self.touched, fresh=self.fresh,
            )
        )  # fmt: skip
        fed = [Fed(row, self.cache.hold) for row in tokens]
        for i in range(len(self.layers)):
            out = self._layer(i, tokens, positions)
            for row, one in enumerate(fed):
                one.out.append(out[row, num_columns - num_new[row] :])
        self.cache.end_step()
        for row, one in zip(self.rows, fed, strict=True):
            row.extend([one] if one.tokens else [])

    def _layer(self, i: int, tokens: list[list[Token]], positions: Tensor) -> Tensor:
        spec = self.layers[i]
        shape, real = (*positions.shape, -1), positions >= 0
        made = [numbers_of(i, spec, token) for row in tokens for token in row]
        q, k, v = (
            torch.full((*positions.shape, heads, dim), torch.nan).masked_scatter(real[..., None, None], torch.cat([m[at] for m in made]))
            if made else torch.full((*positions.shape, heads, dim), torch.nan)
            for at, heads, dim in ((0, QUERY_HEADS, spec.k_dim), (1, spec.num_kv_heads, spec.k_dim), (2, spec.num_kv_heads, spec.v_dim))
        )  # fmt: skip
        experts = torch.zeros(positions.shape, dtype=torch.int64).masked_scatter(real, torch.tensor([m[3] for m in made], dtype=torch.int64))
        q, scale = q.nan_to_num(0.0), spec.k_dim**-0.5
        partial = self.cache.attend(i, q, k, v, scale=scale, v_dim=spec.v_dim, expert_ids=experts.flatten())
        if partial.includes_self:
            return partial.out.view(*shape[:2], QUERY_HEADS, -1)
        at, of = positions.unsqueeze(2), positions.unsqueeze(1)
        visible = ((of >= 0) & (of <= at) & (of > at - (spec.window or 10**6))).unsqueeze(1)
        own, lse = sdpa_lse(q.transpose(1, 2), k.nan_to_num(0.0).transpose(1, 2), v.nan_to_num(0.0).transpose(1, 2), scale=scale, mask=visible)
        parts = torch.stack([partial.out, own.transpose(1, 2)]), torch.stack([partial.lse, lse.transpose(1, 2)])
        return merge_partials(*parts)[0]

    # ---- what is compared ----------------------------------------------------------------------------------------------------

    def kept(self, row: int) -> list[list[list[int]]]:
        """[layer][local table] positions of a row of this rank, sorted, with the level of the pool each lies in."""
        at = row + self._first_row
        return [
            [sorted((p, level) for level, pool in enumerate(self.probe.pools(i)) for p in pool.positions(at, table)) for table in range(pool_tables)]
            for i, pool_tables in enumerate(self.probe.near_pool(i).num_tables for i in range(len(self.layers)))
        ]  # fmt: skip

    @property
    def _first_row(self) -> int:
        agreement = self.cache.agreement
        return sum(agreement.num_rows[: agreement.own])

    @property
    def record_bytes(self) -> int:
        """Of the K and V records of all pages in use."""
        return sum(pool.used_pages * pool.fmt.record_bytes for pool in self.probe.all_pools)

    def alone(self, row: int) -> Rows:
        """A cache of one rank in which only this row's tokens were fed, in the same forwards; its outputs lie beside these in `rows`."""
        lone = Rows(self.layers, self.config)
        for fed in self.rows[row]:
            with lone.cache.announce_crops() if fed.announced else nullcontext():
                lone._alone(fed.tokens)
        return lone

    def _alone(self, tokens: list[Token]) -> None:
        lens = self.lens if self.rows else [0]
        if self.fresh:
            self.rows, self.parent = [[]], [-1]
        self._forward([tokens], torch.tensor([[token.position for token in tokens]], dtype=torch.int32), lens)
        self.parent, self.fresh, self.touched = [0], False, False

    def differences(self, tolerance: float = 1e-5, since: int = 0) -> list[str]:
        """A line for every row that keeps something else than alone, or whose outputs differ by more than the tolerance."""
        lines = []
        for row in range(len(self.rows)):
            lone = self.alone(row)
            for fed, other in zip(self.rows[row], lone.rows[0], strict=True):
                worst = max((x - y).abs().max().item() for x, y in zip(fed.out, other.out, strict=True))
                if not worst <= tolerance:
                    lines.append(f"row {row}: outputs at {fed.tokens[0].position} differ by {worst:.1e}")
                    break
            mine, whole = self.kept(row), lone.kept(0)
            heads, shards = self.probe.heads, self.cache.map.shards.tolist()
            local = [[tables[s * heads + h] for s in shards for h in range(heads)] for tables in whole]
            lines += [f"row {row}, layer {i}: kept differs" for i, (x, y) in enumerate(zip(mine, local, strict=True)) if x != y]
        return lines


_made: dict[tuple, tuple[Tensor, Tensor, Tensor, int]] = {}


def numbers_of(i: int, spec: LayerSpec, token: Token) -> tuple[Tensor, Tensor, Tensor, int]:
    """q [1, Hq, Dk], k [1, H, Dk], v [1, H, Dv] and the expert of a token in layer i."""
    key = (i, spec.num_kv_heads, spec.k_dim, spec.v_dim, token)
    if key not in _made:
        generator = torch.Generator().manual_seed(((token.stream * LONGEST + token.position) * 16 + i) * 7919 + 1)
        heads = (QUERY_HEADS, spec.k_dim), (spec.num_kv_heads, spec.k_dim), (spec.num_kv_heads, spec.v_dim)
        q, k, v = (torch.randn(1, *shape, generator=generator) for shape in heads)
        _made[key] = q, k, v, int(torch.randint(EXPERTS, (), generator=generator))
    return _made[key]
