"""Cases for the attention ops: a store filled by `append`, everything else poisoned with NaN, and the answer in f64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pikv_ds.ops import library
from pikv_ds.ops.build import load
from pikv_ds.ops.format.formats import FORMATS, GROUP, PageFormat
from pikv_ds.ops.reference import append as ref_append
from pikv_ds.ops.reference import attend as ref_attend
from pikv_ds.ops.reference import formats as ref_formats

# The reference, the CPU version capped at an instruction set, the CUDA kernels under the host emulation.
IMPLEMENTATIONS = ("torch", "baseline", "avx2", "avx512", "vnni", "phases", "phases_bf16", "phases_amx", "emu")


@dataclass
class Case:
    fmt: PageFormat
    pages: Tensor
    q: Tensor  # [R, Hq, Dk]
    block_table: Tensor
    seqlens: Tensor
    q_positions: Tensor
    k: Tensor  # [tokens, H, Dk] in order of (table, slot)
    v: Tensor
    extra: dict = field(default_factory=dict)  # tail, tail_rows


def format_of(
    label: str, heads: int, k_dim: int, v_dim: int, page_size: int | None = None, latent: bool = False, group: int = GROUP
) -> PageFormat:
    """The format with this PageFormat.label: int4, int8/int4 (a latent layer: int8 alone), int4+rope (a layer that is not latent: int4)."""
    name, _, v_name = label.removesuffix("+rope").partition("/")
    page_size = page_size or small_page(label)
    rope_raw = label.endswith("+rope") and latent and k_dim > v_dim
    return PageFormat(name, heads, k_dim, v_dim, page_size, latent, group, v_name=None if latent else v_name or None, rope_raw=rope_raw)


def small_page(label: str) -> int:
    return 64 if FORMATS[label.removesuffix("+rope").partition("/")[0]].levels else 16


def make_case(
    name="bf16", *, lens=(37,), shards=1, heads=2, group=4, k_dim=64, v_dim=None, page_size=None, latent=False, dtype=torch.bfloat16,
    seed=0, stretch=1, unused=0xFF, scale_group=GROUP, growth=1.0,
) -> Case:  # fmt: skip
    """`lens`: entries of each request, dealt to `shards` tables at random, so that no table holds a run of positions.

    stretch: the positions of a request are drawn from so many times as many, as those of one shard among others are.
    growth: the last token's value is so many times as large as the first's.
    unused: every byte that no entry has been written to; 0xFF is NaN in every float format.
    """
    generator = torch.Generator().manual_seed(seed)
    fmt = format_of(name, heads, k_dim, v_dim or k_dim, page_size, latent, scale_group)
    page_size = fmt.page_size
    R, N = len(lens), len(lens) * shards
    owner = [torch.randint(shards, (length,), generator=generator) for length in lens]
    draw = lambda length: torch.randperm(stretch * length, generator=generator)[:length].sort().values  # noqa: E731
    drawn = [(torch.arange(length) if stretch == 1 else draw(length)).int() for length in lens]
    positions = [drawn[n // shards][owner[n // shards] == n % shards] for n in range(N)]
    counts = [p.numel() for p in positions]
    used = [-(-count // page_size) for count in counts]
    total, width = sum(used), max(used, default=0) + 1
    pages = torch.full((total + 3, fmt.record_bytes), unused, dtype=torch.uint8)
    ids = torch.randperm(total + 3, generator=generator).int()
    block_table = torch.full((N, 1, width), 1 << 30, dtype=torch.int32)  # must not be read beyond seqlens
    tokens = sum(counts)
    scale = 1 + torch.rand(1, heads, k_dim, generator=generator)
    k = (torch.randn(tokens, heads, k_dim, generator=generator) * scale + torch.randn(1, heads, k_dim, generator=generator)).to(dtype)
    v = torch.randn(tokens, heads, fmt.v_dim, generator=generator)
    v = (v * torch.linspace(1, growth, tokens).view(-1, 1, 1)).to(dtype)
    extra = {}
    if fmt.grouped:
        tail = torch.full((N, heads, fmt.group, k_dim * dtype.itemsize), unused, dtype=torch.uint8).view(dtype)
        extra = {"tail": tail, "tail_rows": torch.randperm(N, generator=generator).int()}
    slots, at = [], 0
    for n in range(N):
        block_table[n, 0, : used[n]] = ids[at : at + used[n]]
        at += used[n]
        token = torch.arange(counts[n])
        slots.append(block_table[n, 0, token // page_size] * page_size + token % page_size)
    rows = {} if not extra else {"tail": extra["tail"], "tail_rows": torch.repeat_interleave(extra["tail_rows"], torch.tensor(counts))}
    ref_append.append(pages, fmt, k, v, torch.cat(positions), torch.cat(slots), **rows)
    q = torch.randn(R, heads * group, k_dim, generator=generator).to(dtype)
    seqlens = torch.tensor(counts, dtype=torch.int32).view(N, 1)
    return Case(fmt, pages, q, block_table, seqlens, stretch * torch.tensor(lens, dtype=torch.int32), k, v, extra)


def answer(case: Case, **options):
    """The same attention in f64 by the reference."""
    with_page_lse = options.pop("with_page_lse", False)
    out, lse, page_lse = ref_attend.attend(
        case.q.double().unsqueeze(1), case.pages, case.fmt, case.block_table, case.seqlens, scale=case.fmt.k_dim**-0.5,
        q_positions=case.q_positions.unsqueeze(1), with_page_lse=with_page_lse, **case.extra, **options,
    )  # fmt: skip
    return out.squeeze(1), lse.squeeze(1), None if page_lse is None else page_lse.squeeze(1)


def run(case: Case, implementation: str, monkeypatch, *, window=0, page_list=None, with_page_lse=False, num_splits=0):
    args = (case.q, case.pages, case.block_table, case.seqlens, case.q_positions, page_list,
            case.extra.get("tail"), case.extra.get("tail_rows"),
            *library.layout(case.fmt), case.fmt.k_dim**-0.5, window, with_page_lse, num_splits)  # fmt: skip
    return call("decode", implementation, monkeypatch, *args)


def call(name: str, implementation: str, monkeypatch, *args):
    if implementation == "torch":
        return library.REFERENCE[name](*args)
    if implementation == "emu":
        load.define_emu()
        return getattr(torch.ops.pikv_emu, name)(*args)
    monkeypatch.setenv("PIKV_CPU", implementation)
    return getattr(torch.ops.pikv, name)(*args)


def compare(found: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """Relative error norm for out, which is returned; both numbers in the message."""
    error = ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    assert torch.isfinite(found).all(), f"{what}: not finite"
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}; norms {found.norm():.6f} and {expected.norm():.6f}"
    return error


def compare_lse(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert torch.equal(found == -torch.inf, expected == -torch.inf), f"{what}: -inf in different places"
    seen = expected != -torch.inf
    error = (found.double() - expected)[seen].abs().max().item() if seen.any() else 0.0
    assert error <= tolerance, f"{what}: absolute error {error:.2e} > {tolerance:.0e}"


__all__ = ["IMPLEMENTATIONS", "Case", "answer", "call", "compare", "compare_lse", "make_case", "ref_formats", "run"]
