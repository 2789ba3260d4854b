"""A decode step of a cache, recorded once and played again: one CUDA graph for all layers. R rows, L layers.

What is recorded is what happens between begin_step and end_step: `attend` of every layer with whatever the caller computes around it, and
entries that wait for a later layer. It reads and writes tensors that stay where they are, in the room that `PiKVCache.reserve` holds.

| part of a step | where |
|---|---|
| positions and lengths of the step | copied into tensors of the graph before it is played, from the host, without a stop |
| slots of the new entries, pages that they open | inside, by `assign_slots`, from a stack that the reservation has filled |
| pages that leave a window or a budget | after it, in place, by the host as in any step |
| whether it may be played | before it, from numbers of the host alone: lengths, and the generation of the memory |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import eager
from pikv_ds.staging import sent
from pikv_ds.step.step import LocalStep, Step

from .cache import PiKVCache

Made = TypeVar("Made")


class Recorder(Protocol):
    """Records what a device is asked for, and asks for it again."""

    def record(self, work: Callable[[], Any]) -> Any:
        """What `work` returns. When record returns the device has been asked for it once."""

    def replay(self) -> None: ...


class CudaRecorder:
    """torch.cuda.graph."""

    def __init__(self, pool: Any = None) -> None:
        """pool: of the memory that the graph keeps (torch.cuda.graph_pool_handle()); None = its own."""
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool

    def record(self, work: Callable[[], Any]) -> Any:
        with torch.cuda.graph(self.graph, pool=self.pool):
            made = work()
        self.graph.replay()
        return made

    def replay(self) -> None:
        self.graph.replay()


class StepGraph(Generic[Made]):
    """Decode steps of one cache: the first runs as it is (libraries load, buffers come into being), the second is recorded, the others are
    played. A graph belongs to the rows and shards that the cache has now; another number of rows is another graph.
    """

    def __init__(self, core: PiKVCache, work: Callable[[Tensor], Made], recorder: Recorder | None = None) -> None:
        """work(positions): the forward on tensors that stay where they are; positions [R, 1] int32, -1 = a row without a token.

        Raises: UnsupportedError for a cache whose step can't be recorded, with the reason.
        """
        why = refusal(core)
        if why is not None:
            raise UnsupportedError(f"a decode step of this cache can't be recorded as a graph: {why}")
        self.core, self._work = core, work
        self._recorder = CudaRecorder() if recorder is None else recorder
        num_rows, num_layers = len(core.agreement.lens), len(core.layers)
        self.num_rows = num_rows
        self.generation = core.pages.addresses.generation
        """Of the cache's memory. Once that is another, the graph would read and write memory that is no longer the cache's."""
        self.positions, self._sizes = _buffers(num_rows, num_layers, core.device)
        """[R, 1] int32: of the step that is played."""
        self._made: Made | None = None
        self._steps, self._sent = 0, (0, 0, 0)

    @property
    def stale(self) -> bool:
        """It can't be played any more: rows have changed, or the cache was reset or has outgrown what was reserved."""
        return self.generation != self.core.pages.addresses.generation or self.core.pages.room.held is None

    @eager
    def __call__(self, local: LocalStep) -> Made:
        """Run one step. Its result lies where that of the last one lay, and stays until the next.

        Args: local: one token or none of each row; its positions are copied. All ranks of replicated requests call it for the same step.
        Raises: UnsupportedError, before anything has changed, for a graph that is stale or a step that is another.
        """
        core = self.core
        self._check(local)
        core.begin_step(replace(local, positions=self.positions))
        if core.exchange.size > 1:
            core.agreement.check_replicated(core.exchange.headers("playing a step of a graph"))
        core.open(core.agreement.continue_plain(local), [core.announced])
        step = core.step
        assert step is not None and step.held, "checked before"
        self._fill(local, step)
        made = self._run(step)
        core.end_step()
        return made

    def _check(self, local: LocalStep) -> None:
        core = self.core
        if self.stale:
            raise UnsupportedError(
                f"this graph was made for generation {self.generation} of the cache's memory, which is at "
                f"{core.pages.addresses.generation}: rows have changed, or the cache was reset or has outgrown its reservation; call "
                "reserve() and make another graph"
            )
        if not core.agreement.is_plain(local) or not local.identity:
            raise UnsupportedError(
                f"this graph plays decode steps of {self.num_rows} rows that go on, one token each; the step has {local.num_rows} rows of "
                f"{local.num_columns} tokens (forks, crops and prompts run as ordinary forwards)"
            )
        if core.hold_margin is not None:
            raise UnsupportedError("a crop is announced (assisted decoding): such steps run as ordinary forwards")
        held, longest = core.pages.room.held, max(n + new for n, new in zip(local.keep, local.num_new, strict=True))
        if held is None or longest > held:
            raise UnsupportedError(f"a row would have {longest} tokens, and reserve() has made room for {held}; reserve more, make another")

    def _fill(self, local: LocalStep, step: Step) -> None:
        """What the step reads lies where the graph reads it. Sync: none."""
        self.positions.copy_(local.positions)
        numbers = [*step.lens_before_host, *step.lens_after_host, *step.capacity]
        self._sizes.copy_(sent(numbers, torch.int64, self._sizes.device))
        step.lies_at(*self._sizes.split([self.num_rows, self.num_rows, len(step.capacity)]))

    def _run(self, step: Step) -> Made:
        self._steps += 1
        if self._steps == 1:
            return self._forward(step)
        if self._made is None:
            before = self._collectives()
            self._made = self._recorder.record(lambda: self._forward(step))
            self._sent = tuple(n - m for n, m in zip(self._collectives(), before, strict=True))
            return self._made
        self._recorder.replay()
        exchange = self.core.exchange
        exchange.collectives, exchange.bytes_sent = exchange.collectives + self._sent[0], exchange.bytes_sent + self._sent[1]
        exchange.state.calls += self._sent[2]
        return self._made

    def _forward(self, step: Step) -> Made:
        made = self._work(self.positions)
        self.core.ways[self.core.agreement.mode].flush(step)
        return made

    def _collectives(self) -> tuple[int, int, int]:
        exchange = self.core.exchange
        return exchange.collectives, exchange.bytes_sent, exchange.state.calls


@eager
def _buffers(num_rows: int, num_layers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions [R, 1] int32; lengths before, lengths after and capacities, [2 R + L] int64."""
    positions = torch.zeros(num_rows, 1, dtype=torch.int32, device=device)
    return positions, torch.zeros(2 * num_rows + num_layers, dtype=torch.int64, device=device)


def refusal(core: PiKVCache) -> str | None:
    """Why a decode step of a cache can't be recorded; None: it can."""
    if core.pages.room.held is None:
        return "its memory may move; call reserve(tokens) after the first forward of its rows"
    if core.agreement.mode == "distinct":
        return "requests of the ranks are distinct, and each step's records are as long as the ranks have tokens"
    if core.selection is not None:
        return f"pikv.routing.method = {core.config.routing.method!r} plans on the host how many pages each query reads"
    if any(core.reader.shares(layer) is not None for layer in range(len(core.layers))):
        return "a policy or a raw window watches attention (pikv.scheduling, pikv.compression): what it keeps is replaced in every step"
    return None
