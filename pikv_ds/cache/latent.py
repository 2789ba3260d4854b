"""MLA: heads over a latent that is stored once (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The projections that expand a latent c [R] into heads are folded into the query and the output instead: up_k [H, D, R] gives the unrotated
part of a key, up_v [H, Dv, R] the value. B rows, T columns, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def absorb_query(q: Tensor, up_k: Tensor) -> Tensor:
    """q [B, T, H, D + D_rot] -> [B, T, H, R + D_rot], so that q . [c | k_rot] equals q . expanded key."""
    plain, rotated = q.tensor_split([up_k.shape[1]], -1)
    return torch.cat([torch.einsum("bthd,hdr->bthr", plain, up_k), rotated], -1)


def expand_value(out: Tensor, up_v: Tensor) -> Tensor:
    """Attention over latents, out [B, T, H, R] f32 -> over values [B, T, H, Dv] f32. Computed in the dtype of up_v."""
    return torch.einsum("bthr,hvr->bthv", out.to(up_v.dtype), up_v).to(out.dtype)
