"""Milliseconds of calls on a device: CUDA events around each, or the host's clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_CPU_L2 = 8 << 20  # bytes overwritten between calls on a CPU


class Clock:
    """Times calls on `device`, each with the second-level cache overwritten before it."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        cache = 4 * torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else _CPU_L2
        self._flush = torch.empty(cache, dtype=torch.uint8, device=device)

    def now(self) -> float:
        """Seconds, once everything that was started has run."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def each(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """ms of `repeats` calls, after one that is not timed."""
        call()
        if not self.cuda:
            return [self._on_host(call) for _ in range(repeats)]
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, stop in pairs:
            self._flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]

    def _on_host(self, call: Callable[[], Any]) -> float:
        self._flush.zero_()
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The same call as a CUDA graph that is replayed, so that the host is not what is timed; on a CPU the call itself."""
        if not self.cuda:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()  # its outputs lie in the graph's memory: they live as long as the replay
        return lambda: (graph.replay(), kept)
