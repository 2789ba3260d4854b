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
    several: bool
    """The forward had several columns: queries were answered before its entries were stored."""
    out: list[Tensor] = field(default_factory=list)

    def first(self, n: int) -> Fed:
        return Fed(self.tokens[:n], self.announced, self.several, [x[:n] for x in self.out])


class Rows:
    """A cache, and the history of its rows. Row changes wait for the next forward, as the hosts' caches do it."""

    def __init__(self, layers: list[LayerSpec], config: dict, group=None, *, streams: int = 0) -> None:
        """streams: added to the number of every stream that is fed."""
        self.layers, self.config, self.streams = layers, config, streams
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
        tokens = [[Token(self.streams + s, n + i) for i in range(new)] for s, n, new in zip(streams, lens, num_new, strict=True)]
        width = max(num_new)
        positions = [[-1] * (width - len(row)) + [token.position for token in row] for row in tokens]
        self._forward(tokens, torch.tensor(positions, dtype=torch.int32).view(len(streams), width), lens)
        self.parent, self.fresh, self.touched = list(range(len(streams))), False, False

    def _forward(self, tokens: list[list[Token]], positions: Tensor, lens: list[int]) -> None:
        num_new, (num_rows, num_columns) = [len(row) for row in tokens], positions.shape
        self.cache.begin_step(
            LocalStep(
                num_rows=num_rows, num_columns=num_columns, num_new=num_new, parent=self.parent, keep=lens, positions=positions, digest=0,
                identity=not self.fresh and not self.touched, fresh=self.fresh,
            )
        )  # fmt: skip
        fed = [Fed(row, self.cache.announced.hold, num_columns > 1) for row in tokens]
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
        shapes = (QUERY_HEADS, spec.k_dim), (spec.num_kv_heads, spec.k_dim), (spec.num_kv_heads, spec.v_dim)
        q, k, v = (torch.full((*positions.shape, *one), torch.nan) for one in shapes)
        experts = torch.zeros(positions.shape, dtype=torch.int64)
        for token, (row, column) in zip(made, real.nonzero().tolist(), strict=True):
            q[row, column], k[row, column], v[row, column], experts[row, column] = token
        q, scale = q.nan_to_num(0.0), spec.k_dim**-0.5
        partial = self.cache.attend(i, q, k, v, scale=scale, v_dim=spec.v_dim, expert_ids=experts.flatten())
        if self.cache.late_experts:
            self.cache.name_experts(i, experts.flatten())
        if partial.includes_self:
            return partial.out.view(*shape[:2], QUERY_HEADS, -1)
        at, of = positions.unsqueeze(2), positions.unsqueeze(1)
        visible = ((of >= 0) & (of <= at) & (of > at - (spec.window or 10**6))).unsqueeze(1)
        own_q, own_k, own_v = (x.nan_to_num(0.0).transpose(1, 2) for x in (q, k, v))
        own, lse = sdpa_lse(own_q, own_k, own_v, scale=scale, mask=visible)
        parts = torch.stack([partial.out, own.transpose(1, 2)]), torch.stack([partial.lse, lse.transpose(1, 2)])
        return merge_partials(*parts)[0]

    # ---- what is compared ----------------------------------------------------------------------------------------------------

    def kept(self, row: int) -> list[list[list[int]]]:
        """[layer][local table] positions of a row of this rank, sorted, with the level of the pool each lies in."""
        return [self._kept(i, row + self.probe.first_row) for i in range(len(self.layers))]

    def _kept(self, i: int, row: int) -> list[list[tuple[int, int]]]:
        pools = list(enumerate(self.probe.pools(i)))
        tables = range(self.probe.near_pool(i).num_tables)
        return [sorted((p, level) for level, pool in pools for p in pool.positions(row, table)) for table in tables]

    @property
    def record_bytes(self) -> int:
        """Of the K and V records of all pages in use."""
        return sum(pool.used_pages * pool.fmt.record_bytes for pool in self.probe.all_pools)

    def alone(self, row: int) -> Rows:
        """A cache of one rank in which only this row's tokens were fed, in the same forwards; its outputs lie beside these in `rows`."""
        lone = Rows(self.layers, self.config)
        for fed in self.rows[row]:
            with lone.cache.announce_crops() if fed.announced else nullcontext():
                lone._alone(fed.tokens, fed.several)
        return lone

    def _alone(self, tokens: list[Token], several: bool) -> None:
        lens = self.lens if self.rows else [0]
        if self.fresh:
            self.rows, self.parent = [[]], [-1]
        padding = [-1] * (several and len(tokens) == 1)
        self._forward([tokens], torch.tensor([padding + [token.position for token in tokens]], dtype=torch.int32), lens)
        self.parent, self.fresh, self.touched = [0], False, False

    def differences(self, tolerance: float = 1e-5) -> list[str]:
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
            heads, shards = self.probe.heads, self.probe.local_shards
            local = [[tables[s * heads + h] for s in shards for h in range(heads)] for tables in whole]
            lines += [f"row {row}, layer {i}: kept differs" for i, (x, y) in enumerate(zip(mine, local, strict=True)) if x != y]
        return lines


# ---- what may happen to rows: each starts with an empty cache -----------------------------------------------------------------


def fork(rows: Rows) -> None:
    """One prefix, three rows that go on differently, one token at a time and several."""
    rows.feed([1], [31])
    rows.feed([1], [1])
    rows.select([0, 0, 0])
    for new in (*[1] * 9, 5, *[1] * 9):
        rows.feed([2, 3, 4], [new] * 3)


def beams(rows: Rows) -> None:
    """As beam search reorders: rows end, others go on twice."""
    rows.feed([1, 2], [31, 31])
    rows.select([0, 0, 1, 1])
    for i, index in enumerate(([0, 0, 2, 3], [1, 0, 3, 3], [0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, 1], [0, 1, 2, 2]) * 3):
        rows.select(index)
        rows.feed([10 + 4 * i + beam for beam in range(4)], [1] * 4)


def drops(rows: Rows) -> None:
    """Rows leave the batch, and those that stay change places."""
    rows.feed([1, 2, 3], [31, 31, 31])
    for stay in ([0, 1, 2], [2, 0], [1]):
        rows.select(stay)
        for _ in range(6):
            rows.feed([5, 6, 7][: len(stay)], [1] * len(stay))


def ragged(rows: Rows) -> None:
    """Rows of other lengths: longer than a block of queries, with padding, without a token in a forward."""
    rows.feed([1, 2, 3], [71, 7, 40])
    for _ in range(6):
        rows.feed([1, 2, 3], [1, 1, 1])
    rows.feed([1, 2, 3], [3, 0, 9])
    for _ in range(6):
        rows.feed([1, 2, 3], [1, 1, 1])
    rows.select([0, 1, 1, 2])
    for _ in range(8):
        rows.feed([4, 5, 6, 7], [1] * 4)


def crops(rows: Rows) -> None:
    """As assisted generation: several tokens, some of them taken back, from the first forward on; then a fork."""
    with rows.cache.announce_crops():
        rows.feed([1, 2], [80, 26])
        rows.crop([n - 3 for n in rows.lens])
        for i, back in enumerate((2, 0, 3, 1, 4, 5)):
            rows.feed([10 + i, 20 + i], [5, 5])
            rows.crop([n - back for n in rows.lens])
    rows.select([0, 1, 1])
    for _ in range(8):
        rows.feed([4, 5, 6], [1] * 3)


SCENES = {scene.__name__: scene for scene in (fork, beams, drops, ragged, crops)}

_made: dict[tuple, tuple[Tensor, Tensor, Tensor, int]] = {}


def numbers_of(i: int, spec: LayerSpec, token: Token) -> tuple[Tensor, Tensor, Tensor, int]:
    """q [Hq, Dk], k [H, Dk], v [H, Dv] and the expert of a token in layer i."""
    key = (i, spec.num_kv_heads, spec.k_dim, spec.v_dim, token)
    if key not in _made:
        generator = torch.Generator().manual_seed(((token.stream * LONGEST + token.position) * 16 + i) * 7919 + 1)
        heads = (QUERY_HEADS, spec.k_dim), (spec.num_kv_heads, spec.k_dim), (spec.num_kv_heads, spec.v_dim)
        q, k, v = (torch.randn(shape, generator=generator) for shape in heads)
        _made[key] = q, k, v, int(torch.randint(EXPERTS, (), generator=generator))
    return _made[key]
