"""Random queries, keys and values of the cases that are compared with kvpress. Needs torch only: both environments import it."""

from typing import NamedTuple

import torch
from torch import Tensor

HEAD_DIM, THETA = 16, 10_000.0


class Case(NamedTuple):
    """method: a policy of ours; heads: "shared" (one KV head), "uniform" or "adaptive" budgets of two KV heads."""

    method: str
    heads: str
    seed: int
    length: int
    num_q_heads: int
    num_kv_heads: int
    kept: int  # entries per KV head, on average


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q before RoPE [L, Hq, D], k after RoPE [L, Hkv, D], v [L, Hkv, D], f32. Heads differ in how sharp their attention is."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.length, case.num_q_heads + 2 * case.num_kv_heads, HEAD_DIM)
    q, k, v = torch.randn(shape, generator=generator).split([case.num_q_heads, case.num_kv_heads, case.num_kv_heads], 1)
    return q + 0.5 * torch.randn(q.shape[1:], generator=generator), k * (1 + torch.arange(case.num_kv_heads).view(1, -1, 1)), v


def rotated(q: Tensor) -> Tensor:
    """RoPE at positions 0, 1, ... in halves, as Llama has it. q [L, H, D]."""
    rate = THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = (torch.arange(q.shape[0]).unsqueeze(-1) * rate).unsqueeze(1)
    x, y = q.chunk(2, -1)
    return torch.cat([x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()], -1)


def digest(cases: list[Case]) -> float:
    """Changes when the random numbers do: kept sets of other numbers say nothing."""
    return sum(float(tensor.double().sum()) for case in cases[::97] for tensor in tensors(case))
