"""Pages that come into staging before they are asked for."""

from __future__ import annotations

from torch import Tensor

from .library import OPS
from .stage import Staging


def stage_ahead(
    score: Tensor, hidden: Tensor, block_table: Tensor, staging: Staging, *, first_far: int, clock: int, most: int
) -> tuple[Tensor, Tensor]:
    """Give the best far pages that are not staged slots that were not asked for at `clock`, at most `most` of each section.

    Args: score [N, X, C] f32, -inf: never; hidden [N, C] bool: never; block_table, staging, first_far as in `stage`.

    Returns: coming [X * G, 3] int64 as in `stage`, and [1] int64, how many. Of equal scores the lower far page. Sync: reads the host.
    """
    return OPS.stage_ahead(score, hidden, block_table, *staging, first_far, clock, most)
