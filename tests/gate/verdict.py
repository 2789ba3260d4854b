"""From ratios to a verdict: the median of the pairs with its bootstrap interval, the limit, and the second run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

LIMIT = 1.02  # a step may be slower by this much before the gate closes
RESAMPLES = 2000
Run = TypeVar("Run")


class Interval(NamedTuple):
    median: float
    low: float
    high: float


def median_interval(ratios: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The median and its percentile bootstrap interval, from RESAMPLES samples of the pairs with replacement; the same for a seed.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3.
    """
    pairs = np.asarray(ratios, dtype=np.float64)
    if pairs.ndim != 1 or len(pairs) < 2 or not np.isfinite(pairs).all():
        raise ValueError(f"an interval needs two finite ratios or more, got {ratios!r}")
    drawn = np.random.default_rng(seed).integers(0, len(pairs), size=(RESAMPLES, len(pairs)))
    low, high = np.quantile(np.median(pairs[drawn], axis=1), ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(float(np.median(pairs)), float(low), float(high))


def is_slower(ratio: Interval) -> bool:
    """current / base is above the limit with all of its interval."""
    return ratio.low > LIMIT


def judged(run: Callable[[], Run], ratio_of: Callable[[Run], Interval]) -> list[tuple[Run, str]]:
    """One run, or two when the first is slower, each with what is said of it: "passed", "slower, run again" or "FAILED"."""
    first = run()
    if not is_slower(ratio_of(first)):
        return [(first, "passed")]
    second = run()
    return [(first, "slower, run again"), (second, "FAILED" if is_slower(ratio_of(second)) else "passed")]
