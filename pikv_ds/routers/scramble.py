"""A hash of integers: what looks random and is the same in every run and on every rank."""

import torch
from torch import Tensor


def scramble(x: Tensor, salt: int) -> Tensor:
    """Integers of any shape -> int64 in [0, 2^24), exact in f32. Source: the finaliser of MurmurHash3 (public domain), on 32 bits."""
    x = (x.to(torch.int64) + (salt + 1) * 0x9E3779B1) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return (x ^ (x >> 16)) >> 8
