"""How a budget is divided: ratio, bytes, pyramid; what is always kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pikv_ds.config.scheduling import SchedulingConfig
from pikv_ds.errors import ConfigError
from pikv_ds.retention.budgets import Budgets, least_entries, pyramid


def budgets(num_layers: int = 4, page_size: int = 4, num_shards: int = 1, entry_bytes: float = 64.0, **block) -> Budgets:
    config = SchedulingConfig(method="h2o", sink_tokens=2, recent_tokens=6, **block)
    return Budgets(config, num_layers, page_size, num_shards, entry_bytes)


def test_units():
    assert budgets(budget_tokens=40).of(1000) == [40] * 4
    assert budgets(budget_ratio=0.25).of(1001) == [251] * 4
    assert budgets(budget_bytes=64 * 50 + 63).of(7) == [50] * 4


def test_a_ratio_of_a_short_request_keeps_what_is_pinned():
    least = least_entries(2, 6, 4, 1)
    assert budgets(budget_ratio=0.25).of(9) == [least] * 4 == [14] * 4


@given(st.integers(1, 5), st.integers(0, 9), st.integers(0, 9), st.integers(1, 4), st.data())
def test_pinned_pages_never_hold_more_than_the_least(page_size, sinks, recent, num_shards, data):
    homes = data.draw(st.lists(st.integers(0, num_shards - 1), max_size=60))
    held = 0
    for shard in range(num_shards):
        positions = [p for p, home in enumerate(homes) if home == shard]
        pages = [positions[i : i + page_size] for i in range(0, len(positions), page_size)]
        held += sum(len(p) for p in pages if len(p) < page_size or p[0] < sinks or p[-1] >= len(homes) - recent)
    assert held <= least_entries(sinks, recent, page_size, num_shards)


@given(st.integers(14, 5000), st.integers(2, 64))
def test_pyramid_gives_less_to_later_layers_and_no_more_in_all(mean, num_layers):
    given_out = pyramid(mean, 14, num_layers)
    assert given_out == sorted(given_out, reverse=True) and min(given_out) >= 14
    assert num_layers * (mean - 1) <= sum(given_out) <= num_layers * mean
    assert given_out[0] <= 14 + 2 * (mean - 14)


def test_pyramid_of_a_thousand():
    assert budgets(budget_tokens=1014, layer_budget="pyramid").of(10**6) == [1964, 1330, 697, 64]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"budget_tokens": 13}, "pikv.scheduling.budget_tokens = 13: legal is >= 14"),
        ({"budget_bytes": 800}, "legal is >= 896 with page_size 4"),
    ],
)
def test_budgets_that_cannot_hold_what_is_pinned_are_refused(block, said):
    with pytest.raises(ConfigError, match=said):
        budgets(**block)
