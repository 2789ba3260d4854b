"""torch's attention over contiguous keys and values, the query heads of a KV head as rows of one query."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .data import DIM, HEADS, Data
from .worker import Case, serve


def cases(given: Data, threads: int) -> Iterator[Case]:
    torch.set_num_threads(threads)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        q = torch.from_numpy(given.q).to(dtype).view(given.q.shape[0], HEADS, -1, DIM)
        k, v = (torch.from_numpy(x).to(dtype).transpose(1, 2).contiguous() for x in (given.k, given.v))
        yield _case(name, q, k, v)


def _case(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Case:
    last = []

    def call() -> None:
        last[:] = [sdpa(q, k, v)]

    note = f"torch {torch.__version__}, [head][token][{DIM}]"
    return Case(f"torch SDPA {name}", call, lambda: last[0].float(), k.nbytes + v.nbytes, note)


if __name__ == "__main__":
    serve(cases)
