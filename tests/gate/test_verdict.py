"""The statistics of the gate: intervals hold what they should, only a ratio surely above the limit closes it, and only twice."""

import numpy as np
import pytest

from tests.gate.verdict import LIMIT, Interval, is_slower, judged, median_interval

PAIRS, NOISE = 61, 0.03  # relative, of one pair


def ratios(true: float, seed: int) -> np.ndarray:
    """Skewed, as steps are: now and then a pair in which the machine did something else."""
    rng = np.random.default_rng(seed)
    busy = np.exp(0.5 * rng.standard_normal(PAIRS)) * (rng.random(PAIRS) < 0.1)
    return true * np.exp(NOISE * rng.standard_normal(PAIRS) + busy * rng.choice([-1, 1], PAIRS))


def test_the_interval_covers_the_true_ratio():
    intervals = [median_interval(ratios(1.1, seed)) for seed in range(300)]
    covered = np.mean([interval.low <= 1.1 <= interval.high for interval in intervals])
    assert 0.91 <= covered <= 0.98, f"{covered:.3f} of 95 % intervals hold the true ratio"
    assert all(interval.low <= interval.median <= interval.high for interval in intervals)
    assert np.mean([interval.high - interval.low for interval in intervals]) < 0.03, "wider than the noise of a median"


def test_the_interval_repeats_itself():
    sample = ratios(1.0, 0)
    assert median_interval(sample) == median_interval(list(sample))
    assert median_interval(sample).median == np.median(sample)
    assert median_interval(sample, confidence=0.5).low > median_interval(sample).low


@pytest.mark.parametrize("sample", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_too_few_or_broken_ratios_are_refused(sample):
    with pytest.raises(ValueError, match="two finite ratios or more"):
        median_interval(sample)


def test_what_is_slower():
    assert is_slower(Interval(1.05, LIMIT + 1e-9, 1.08))
    assert not is_slower(Interval(1.05, LIMIT, 1.08)), "the limit itself is legal"
    assert not is_slower(Interval(1.5, 1.01, 3.0)), "not sure"
    slower = {true: np.mean([is_slower(median_interval(ratios(true, seed))) for seed in range(100)]) for true in (1.0, 1.01, 1.05)}
    assert slower[1.0] == 0 and slower[1.01] <= 0.02 and slower[1.05] >= 0.98, slower


SLOW, FAST = Interval(1.06, 1.04, 1.08), Interval(1.01, 1.0, 1.02)


@pytest.mark.parametrize(
    "outcomes, said",
    [([FAST], ["passed"]), ([SLOW, FAST], ["slower, run again", "passed"]), ([SLOW, SLOW], ["slower, run again", "FAILED"])],
    ids=["fast", "slow then fast", "slow twice"],
)
def test_a_slower_run_is_made_once_more(outcomes, said):
    left = list(outcomes)
    runs = judged(lambda: left.pop(0), lambda interval: interval)
    assert runs == list(zip(outcomes, said, strict=True)), "both runs are reported, in order"
    assert not left, "every outcome was asked for, and no other"
