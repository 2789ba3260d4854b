"""A cache whose decode steps are recorded and played, beside one that runs them as they are. R rows, L layers, H heads, D head_dim."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import stats
from pikv_ds.cache.step_graph import StepGraph
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep
from tests.device.far import FarTensor
from tests.device.tape import Tape, held

EXPERTS, HEADS = 8, 4


@dataclass
class Steps:
    """One cache and what it is given. The tensors of a decode step stay where they are, as those of a graph do."""

    layers: list[LayerSpec]
    block: dict
    rows: int
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: object = None

    def __post_init__(self) -> None:
        self.cache = PiKVCache(
            self.layers, PiKVConfig(**self.block), num_experts=EXPERTS, dtype=self.dtype, device=self.device, group=self.group
        )
        self.probe = CacheProbe(self.cache)
        self.lens: list[int] = []

    def _there(self, x: Tensor) -> Tensor:
        return x if self.device.type == "cpu" else FarTensor(x)

    def local(self, columns: int, num_new: list[int] | None = None) -> LocalStep:
        fresh = not self.lens
        before, new = self.lens or [0] * self.rows, num_new or [columns] * self.rows
        at = torch.tensor(before).unsqueeze(1) + torch.arange(columns)
        positions = torch.where(torch.tensor(new).unsqueeze(1) > torch.arange(columns), at, -1).to(torch.int32)
        parent = [-1] * self.rows if fresh else list(range(self.rows))
        return LocalStep(
            num_rows=self.rows, num_columns=columns, num_new=new, parent=parent, keep=before, positions=self._there(positions), digest=7,
            identity=not fresh, fresh=fresh,
        )  # fmt: skip

    def bring(self, seed: int, columns: int) -> list[tuple[Tensor, ...]]:
        """q, k, v and experts of every layer."""
        draw, brought = torch.Generator().manual_seed(seed), []
        for spec in self.layers:
            shapes = ((HEADS, spec.k_dim), (spec.num_kv_heads, spec.k_dim), (spec.num_kv_heads, spec.stored_v_dim))
            qkv = [torch.randn(self.rows, columns, *shape, generator=draw).to(self.dtype) for shape in shapes]
            brought.append((*qkv, torch.randint(EXPERTS, (self.rows * columns,), generator=draw)))
        return brought

    def attend(self, given: list[tuple[Tensor, ...]]) -> list[Tensor]:
        outputs = []
        for i, (spec, (q, k, v, experts)) in enumerate(zip(self.layers, given, strict=True)):
            found = self.cache.attend(i, q, k, v, scale=spec.k_dim**-0.5, v_dim=spec.v_dim, expert_ids=experts)
            if self.cache.late_experts:
                self.cache.name_experts(i, experts)
            outputs += [found.out, found.lse]
        return outputs

    def forward(self, seed: int, columns: int = 1, num_new: list[int] | None = None) -> list[Tensor]:
        """A forward as any."""
        local, given = self.local(columns, num_new), [tuple(map(self._there, xs)) for xs in self.bring(seed, columns)]
        self.cache.begin_step(local)
        outputs = self.attend(given)
        self.cache.end_step()
        self._grew(local)
        return outputs

    def record(self, tape: Tape) -> StepGraph:
        self.given = [tuple(map(self._there, xs)) for xs in self.bring(0, 1)]
        return StepGraph(self.cache, lambda positions: self.attend(self.given), tape)

    def play(self, graph: StepGraph, seed: int, num_new: list[int] | None = None) -> list[Tensor]:
        for places, xs in zip(self.given, self.bring(seed, 1), strict=True):
            for place, x in zip(places, xs, strict=True):
                held(place).copy_(x)
        local = self.local(1, num_new)
        outputs = graph(local)
        self._grew(local)
        return outputs

    def _grew(self, local: LocalStep) -> None:
        self.lens = [n + new for n, new in zip(self.lens or [0] * self.rows, local.num_new, strict=True)]

    def stored(self) -> list[Tensor]:
        """What must be equal in two caches of the same entries: pages in use, and of every entry its position and its numbers."""
        found = []
        for layer in range(len(self.layers)):
            pool = self.probe.near_pool(layer)
            found.append(torch.tensor(pool.used_pages))
            found += [x for row in range(self.rows) for table in range(pool.num_tables) for x in pool.stored(row, table)]
        return found

    def counted(self) -> dict:
        """What is counted of its entries."""
        numbers = stats(self.cache, self.rows, max(self.lens))
        return {name: n for name, n in numbers.items() if name.startswith(("entries", "load", "spilled"))}
