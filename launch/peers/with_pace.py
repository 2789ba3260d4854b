"""AMD PACE's attention over its slab pool, from the pace-vllm wheel."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from .data import DIM, HEADS, Data
from .worker import Case, serve

BLOCK = 128  # the fastest of 32 to 256


def cases(given: Data, threads: int) -> Iterator[Case]:
    torch.set_num_threads(threads)
    found = importlib.util.find_spec("pace_vllm")
    torch.ops.load_library(str(Path(found.submodule_search_locations[0]) / "lib" / "libpace_cpp.so"))
    batch, context = given.k.shape[:2]
    pool = torch.classes.pace.SlabPool(batch * (context // BLOCK + 2), HEADS, DIM, BLOCK)
    for b in range(batch):
        pool.create_sequence(b + 1, context)
        pool.cache_update([b + 1], *(torch.from_numpy(x[b]).bfloat16() for x in (given.k, given.v)), [context])
    q, sinks, last = torch.from_numpy(given.q).bfloat16(), torch.tensor([], dtype=torch.bfloat16), []

    def call() -> None:
        last[:] = [pool.attention(list(range(1, batch + 1)), q, [1] * batch, [], DIM**-0.5, 0, sinks)]

    nbytes = 2 * batch * context * HEADS * DIM * 2
    yield Case("PACE bf16", call, lambda: last[0].float(), nbytes, f"pace-vllm 1.3.0 SlabPool.attention, blocks of {BLOCK}")


if __name__ == "__main__":
    serve(cases)
