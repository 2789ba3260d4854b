"""Rotary position embeddings by halves of the whole width (Llama, Qwen, Mixtral): channels j and j + D / 2 by position * inv_freq[j].

Source: Su et al., RoFormer, arXiv 2104.09864; in halves as GPT-NeoX and transformers' rope_type "default" have it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def default_inv_freq(theta: float, dim: int) -> Tensor:
    """[dim / 2] f32, theta^(-2 j / dim)."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, *, back: bool = False) -> Tensor:
    """x [..., H, D] rotated to its positions [...], or back from them, in f32 (f64 stays f64). Positions below 0 count as 0. Sync: none."""
    angle = (positions.clamp_min(0).float().unsqueeze(-1) * inv_freq).unsqueeze(-2)  # f32, as models have it
    x = x if x.dtype == torch.float64 else x.float()
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    sin = -sin if back else sin
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def pair_metric(q: Tensor, inv_freq: Tensor, num_heads: int, *, stride: int = 8, at_a_time: int = 1 << 22) -> tuple[Tensor, int]:
    """How much an error e of an un-rotated key weighs in attention: sum over pairs of a query i and a key j <= i of R_j^T q_i q_i^T R_j.

    q . R_j e = (R_j^T q) . e, so that E[(q . R_j e)^2] = e^T metric e. Mean over the query heads of a kv head; of keys every `stride`th.

    Args: q [N, Hq, D] of positions 0 to N - 1, rotated.
    Returns: [num_heads, D, D] f64 and the number of pairs. Cost: holds blocks of about `at_a_time` numbers.
    """
    keys, width = range(0, len(q), stride), q.shape[-1]
    padded = torch.nn.functional.pad(q.double(), (0, 0, 0, 0, 0, -len(q) % stride))  # queries of 0 add nothing
    by_key = padded.unflatten(1, (num_heads, -1)).unflatten(0, (len(keys), stride))  # the queries from each key to the next
    step = max(1, at_a_time // (num_heads * width * width))
    later = padded.new_zeros(num_heads, width, width)  # sum of q q^T over the queries after the block
    total = torch.zeros_like(later)
    for begin in reversed(range(0, len(keys), step)):
        block = by_key[begin : begin + step]
        at = stride * torch.arange(begin, begin + len(block), device=q.device)
        outer = torch.einsum("nshgi,nshgj->nhij", block, block) / block.shape[3]
        seen = outer.flip(0).cumsum(0).flip(0) + later  # of the queries from each key on
        later = seen[0]
        for _ in range(2):  # rows, then columns
            seen = rotate(seen.flatten(1, 2), at, inv_freq, back=True).unflatten(1, (num_heads, width)).mT
        total += seen.sum(0)
    return total, sum(len(q) - key for key in keys)
