import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy


@POLICIES.register("random")
class Shuffled(RetentionPolicy):
    """Keep a random choice of pages (a control: what a method gains over it is what it knows).

    score(page) = a hash of its last position and `seed`, so that every rank and every run keep the same. Source: none.
    """

    reads_positions_only = True

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def score(self, pages: Pages) -> Tensor:
        x = pages.last_position.to(torch.int64) + 0x9E3779B9 * (self.seed + 1)
        for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # the finalizer of MurmurHash3, on 32 bits
            x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
        return (x >> 8).float()
