"""One PiKVCache on one rank, driven as a model would drive it, and what is checked of it. B rows, T columns, H heads, D head_dim."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.ops import merge_partials, sdpa_lse
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep
from tests.harness.checks import Check, Dense
from tests.reference_cache import ReferenceCache, wanted_shard

TOLERANCE = 1e-6  # relative error norm of f32 attention against float64
# Entries of 0 and this are stored without loss by a compressed format: what differs then is a wrong entry, not a rounded one.
EXACT_STEPS = {"int8": 255.0, "int4": 15.0, "int2": 3.0, "fp8_e4m3": 1.0}
COMPRESSED_TOLERANCE = 1e-5


def layer(idx: int, *, window: int | None = None, num_kv_heads: int = 2, dim: int = 8, latent: bool = False) -> LayerSpec:
    k_dim, v_dim = (dim + 8, dim) if latent else (dim, dim)
    return LayerSpec(layer_idx=idx, num_kv_heads=1 if latent else num_kv_heads, k_dim=k_dim, v_dim=v_dim, window=window, latent=latent)


def ragged(num_new: list[int], left: bool = True) -> Tensor:
    """Column mask [B, max] of rows with these many tokens, padded on the left or on the right."""
    width = max(num_new)
    rows = [[False] * (width - n) + [True] * n if left else [True] * n + [False] * (width - n) for n in num_new]
    return torch.tensor(rows, dtype=torch.bool)


C = TypeVar("C", bound=Check)


class Driver:
    """forward() runs every layer on random q, k, v; `checks` say what must hold of it: dense attention unless others are given.

    Padding tokens carry NaN keys and values. Row changes (select, crop) wait for the next forward, as the host's caches do it.
    """

    def __init__(
        self,
        layers: list[LayerSpec],
        *,
        page_size: int = 4,
        num_experts: int = 8,
        num_q_heads: int = 4,
        seed: int = 0,
        checks: list[Check] | None = None,
        dtype: torch.dtype = torch.float32,
        codec: str = "none",
        routing: dict | None = None,
        scheduling: dict | None = None,
        compression: dict | None = None,
        pools: list[dict] | None = None,
        offload: dict | None = None,
        group=None,
        **storage,
    ) -> None:
        self.layers, self.num_experts, self.num_q_heads, self.dtype = layers, num_experts, num_q_heads, dtype
        self.steps, self.tolerance = EXACT_STEPS.get(codec), TOLERANCE if codec == "none" else COMPRESSED_TOLERANCE
        config = PiKVConfig(
            page_size=page_size,
            storage=storage,
            compression={"method": codec} | (compression or {}),
            routing=routing or {},
            scheduling=scheduling or {},
            pools=pools or [],
            offload=offload or {},
        )
        self.cache = PiKVCache(layers, config, num_experts=num_experts, dtype=dtype, device=torch.device("cpu"), group=group)
        self.probe = CacheProbe(self.cache)
        rule = {
            "num_experts": num_experts,
            "num_shards": self.cache.num_shards,
            "n_tok": config.storage.n_tok,
            "table": config.storage.table,
        }
        self.reference = ReferenceCache(
            layers,
            lambda *entry: wanted_shard(config.storage.placement, *entry, **rule),
            num_shards=self.cache.num_shards,
            page_size=page_size,
            num_ranks=2 if self.cache.num_shards % 2 == 0 else 1,
            capacity_tokens=config.storage.capacity_tokens,
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.skewed = False  # True: all tokens name expert 0
        self.park: list[tuple[int, int]] | None = None  # what the next forward parks (harness/parking.py)
        self.checks = [Dense()] if checks is None else checks
        for check in self.checks:
            check.opened(self)
        self.new_generation()

    def add(self, check: C) -> C:
        """From now on; before the first forward of a generation."""
        check.opened(self)
        check.generation()
        self.checks = [*self.checks, check]
        return check

    def without(self, kind: type[Check]) -> Driver:
        """Stop asking for what does not hold here: who leaves pages out, or drops them, does not answer as dense attention does."""
        self.checks = [check for check in self.checks if not isinstance(check, kind)]
        return self

    def new_generation(self) -> None:
        self.fresh, self.touched, self.lens, self.parent = True, False, [], []
        self.history: list[list[list[tuple[Tensor, Tensor]]]] = []  # [layer][row][position] -> k, v: what a dense cache would hold
        self.end_crops()
        for check in self.checks:
            check.generation()

    def reset(self) -> None:
        self.cache.reset()
        self.reference.restart(0)
        self.new_generation()

    def select(self, index: list[int]) -> None:
        """Row i continues row index[i]."""
        self.touched = self.touched or index != list(range(len(self.lens)))
        self.parent, self.lens = [self.parent[i] for i in index], [self.lens[i] for i in index]
        self.history = [[list(rows[i]) for i in index] for rows in self.history]
        for check in self.checks:
            check.select(index)

    def crop(self, keep: list[int]) -> None:
        self.touched = self.touched or keep != self.lens
        self.lens = list(keep)
        self.history = [[row[:n] for row, n in zip(rows, keep, strict=True)] for rows in self.history]
        if self.crops_announced:
            self.announce_crops()
        for check in self.checks:
            check.crop(keep)

    def announce_crops(self) -> None:
        self.cache.hold_margin = 0

    def end_crops(self) -> None:
        self.cache.hold_margin = None

    @property
    def crops_announced(self) -> bool:
        return self.cache.hold_margin is not None

    def decode(self) -> None:
        self.forward(torch.ones(len(self.lens), 1, dtype=torch.bool))

    def prefill(self, num_new: list[int], left: bool = True) -> None:
        """Start a new generation."""
        self.new_generation()
        self.forward(ragged(num_new, left))

    def forward(self, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """mask [B, T]: the real tokens. Returns (out [B, T, Hq, Dv], lse [B, T, Hq]) per layer, checked."""
        num_rows, num_columns = mask.shape
        if self.fresh:
            self.lens, self.parent = [0] * num_rows, [-1] * num_rows
            self.history = [[[] for _ in range(num_rows)] for _ in self.layers]
        for check in self.checks:
            check.before(mask)
        num_new = mask.sum(1).tolist()
        positions = torch.where(mask, torch.tensor(self.lens).unsqueeze(1) + mask.cumsum(1) - 1, -1)
        self._move_rows(num_rows)
        self.local = LocalStep(
            num_rows=num_rows,
            num_columns=num_columns,
            num_new=num_new,
            parent=self.parent,
            keep=self.lens,
            positions=positions.to(torch.int32),
            digest=0,
            identity=not self.fresh and not self.touched,
            fresh=self.fresh,
            park=self.park,
        )
        self.cache.begin_step(self.local)
        self.reference.begin(num_new, decode=num_columns == 1, hold=self.cache.announced.hold)
        outputs = [self._layer(i, positions) for i in range(len(self.layers))]
        self.cache.end_step()
        self.reference.expire(self.cache.hold_margin or 0)
        self.fresh, self.touched, self.park = False, False, None
        self.lens = [n + new for n, new in zip(self.lens, num_new, strict=True)]
        self.parent = list(range(num_rows))
        for check in self.checks:
            check.after(mask)
        return outputs

    def _move_rows(self, num_rows: int) -> None:
        if self.fresh:
            self.reference.restart(num_rows)
        elif self.touched:
            self.reference.fork(self.parent)
            for row, keep in enumerate(self.lens):
                self.reference.crop(row, keep)

    def _layer(self, i: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        spec, (num_rows, num_columns) = self.layers[i], positions.shape
        q, k, v = (
            torch.randn(num_rows, num_columns, heads, dim, generator=self.generator).to(self.dtype)
            for heads, dim in ((self.num_q_heads, spec.k_dim), (spec.num_kv_heads, spec.k_dim), (spec.num_kv_heads, spec.v_dim))
        )
        if self.steps is not None:
            k, v = ((x > 0).to(self.dtype) * self.steps for x in (k, v))
        v = k[..., : spec.v_dim] if spec.latent else v
        ids = torch.randint(self.num_experts, (num_rows * num_columns,), generator=self.generator)
        ids = torch.zeros_like(ids) if self.skewed else ids
        for row, column in (positions >= 0).nonzero().tolist():
            token = (k[row, column], v[row, column])
            self.history[i][row].append(token)
            self.reference.append(i, row, int(positions[row, column]), int(ids[row * num_columns + column]), *token)
        for check in self.checks:
            check.brought(i, q, k, v, ids)
        out, lse = self._attend(i, q, k, v, ids, positions)
        for check in self.checks:
            check.layer(i, q, positions, out, lse)
        self.reference.place(i)
        return out, lse

    def scale(self, q: Tensor) -> float:
        return q.shape[-1] ** -0.5 / (self.steps or 1)

    def _attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What an attention layer of an adapter does."""
        spec, scale, padding = self.layers[i], self.scale(q), (positions < 0)[..., None, None]
        given_k, given_v = k.masked_fill(padding, torch.nan), v.masked_fill(padding, torch.nan)[..., : spec.stored_v_dim]
        partial = self.cache.attend(i, q, given_k, given_v, scale=scale, v_dim=spec.v_dim, expert_ids=ids)
        if self.cache.late_experts:
            self.cache.name_experts(i, ids)
        if partial.includes_self:
            return partial.out, partial.lse
        at, of = positions.unsqueeze(2), positions.unsqueeze(1)
        visible = (of >= 0) & (of <= at) & (of > at - (spec.window or 10**6))
        own, own_lse = sdpa_lse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, mask=visible.unsqueeze(1))
        return merge_partials(torch.stack([partial.out, own.transpose(1, 2)]), torch.stack([partial.lse, own_lse.transpose(1, 2)]))
