"""Which listed pages lie in staging, and which come there."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .library import OPS


class Staging(NamedTuple):
    """Who lies where: X sections of a record, each with G slots of its own, Q far pages. The tables are changed in place."""

    slot: Tensor
    """[X, Q] int32: where a section of a far page is staged, -1 = nowhere."""
    held: Tensor
    """[X, G] int64: which far page a slot has, -1 = none."""
    asked: Tensor
    """[X, G] int64: the clock when it was asked for last, 0 = never."""
    ahead: Tensor
    """[X, G] bool: it was fetched before anybody asked."""


class Staged(NamedTuple):
    """N tables of C columns, lists of K of them."""

    table: Tensor
    """[N, X, C] int32 rows of the pool's memory for the columns in `listed`, 0 elsewhere."""
    listed: Tensor
    """page_list without what staging does not hold at once."""
    left: Tensor | None
    """What it does not hold at once, -1 elsewhere: the list of the next call. None: nothing, where somebody has looked at counts."""
    coming: Tensor
    """[X * G, 3] int64 (far page, slot, section) of what must be fetched before it is read, -1 behind."""
    counts: Tensor
    """[4] int64: how many come; distinct sections of far pages that are served; those of them fetched ahead; entries left."""


def stage(block_table: Tensor, page_list: Tensor, staging: Staging, *, first_far: int, num_near: int, clock: int) -> Staged:
    """Give every listed far page a place: where it lies already, or the slot that was asked for longest ago.

    Args:
        block_table: [N, 1, C] int32; an id from first_far on is far page id - first_far.
        page_list: [N, X, K] int32 columns, -1 = none; with X = 1 sections lists of any number of heads.
        clock: above all in staging.asked; what is served gets it.
        num_near: the first row of staging in the pool's memory.

    Sync: reads the host; CPU only. Cost: a few passes over the lists, and a partial sort of G numbers.
    """
    return Staged(*OPS.stage(block_table, page_list, *staging, first_far, num_near, clock))
