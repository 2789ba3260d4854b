"""Parked rows: a row that begins as one of them answers as if its tokens had been run, and what nobody parks is given back."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.harness.driver import layer, ragged
from tests.harness.invariants import check, poison
from tests.harness.parking import ParkingDriver, check_parked
from tests.held import check_bytes

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
LONG = os.environ.get("PIKV_HYPOTHESIS") == "long"
MAX_TOKENS = 60


def driver(**options) -> ParkingDriver:
    return ParkingDriver([layer(0), layer(1, latent=True)], **options)


def all_of(driver: ParkingDriver) -> None:
    check(driver)
    check_parked(driver)
    check_bytes(driver.cache)


def test_a_row_begins_as_a_parked_one():
    one = driver(num_shards=2)
    one.prefill([13, 6])
    one.decode()
    one.begin([(-1, 0)], [(0, 14), (1, 4)])
    one.forward(ragged([5]))
    all_of(one)
    poison(one)
    one.begin([(1, 14), (2, 4), (1, 6)], None)
    one.forward(ragged([3, 4, 1]))
    all_of(one)
    for _ in range(6):
        one.decode()
        all_of(one)


def test_bytes_come_back_when_nothing_is_parked_any_more():
    one = driver(num_shards=2, page_size=4)
    one.prefill([40])
    one.begin([(-1, 0)], [(0, 40)])
    one.forward(ragged([4]))
    parked = one.probe.bytes
    assert one.probe.parked.nbytes > 0.8 * parked
    one.begin([(0, 4)], [])
    one.forward(ragged([1]))
    all_of(one)
    assert one.probe.parked.nbytes == 0 and one.probe.bytes < 0.3 * parked


def test_pages_of_parked_rows_move_into_holes():
    """The other row's pages go, and the pool is as small as it can be."""
    one = driver(num_shards=1, page_size=4)
    one.prefill([40, 40])
    one.begin([(-1, 0)], [(1, 40)])
    one.forward(ragged([1]))
    assert one.probe.near_pool(0).num_pages <= 12
    all_of(one)


def test_a_generation_without_parked_rows_counts_from_zero():
    one = driver()
    one.prefill([9])
    one.begin([(-1, 0)], [(0, 9)])
    one.forward(ragged([3]))
    one.begin([(-1, 0)], [])
    one.forward(ragged([2]))
    all_of(one)
    assert one.reference.appended == 2 * len(one.layers)


def test_a_step_sees_no_parked_row():
    """Its tensors are as long as without them."""
    one = driver(num_shards=2)
    one.prefill([9])
    one.begin([(-1, 0)], [(0, 9)])
    one.forward(ragged([3]))
    assert one.probe.row_numbers == {1}


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8_e4m3"])
def test_compressed_entries_come_back(codec):
    """With raw tails, where a format has them."""
    one = driver(num_shards=2, page_size=64, codec=codec, checks=[])
    one.prefill([137, 70])
    pool = one.probe.near_pool(0)
    before = [pool.entries(row, shard) for row in range(2) for shard in range(2)]
    one.begin([(-1, 0)], [(0, 137), (1, 70)])
    one.forward(ragged([5]))
    one.begin([(1, 137), (2, 70)], None)
    one.forward(ragged([1, 0]))
    pool = one.probe.near_pool(0)
    for (row, shard), old in zip([(row, shard) for row in range(2) for shard in range(2)], before, strict=True):
        now, n = pool.entries(row, shard), len(old.positions)
        assert now.positions[:n].tolist() == old.positions.tolist()
        assert n == 0 or (torch.equal(now.keys[:n], old.keys) and torch.equal(now.values[:n], old.values))


class ParkingMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 3, 8]),
        num_shards=st.sampled_from([1, 2, 4]),
        expert_ids=st.sampled_from(["previous_layer", "true"]),
        capacity=st.sampled_from([None, 60]),
        hot=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def start(self, page_size, num_shards, expert_ids, capacity, hot, seed):
        self.driver = driver(page_size=page_size, num_shards=num_shards, expert_ids=expert_ids, seed=seed, capacity_tokens=capacity)
        self.driver.skewed = hot

    def running(self) -> bool:
        return not self.driver.fresh

    def room(self) -> bool:
        return self.running() and max(self.driver.lens) < MAX_TOKENS

    def _sources(self, data, least: int, most: int) -> list[tuple[int, int]]:
        held = self.driver.held_lens
        rows = data.draw(st.lists(st.integers(0, len(held) - 1), min_size=least, max_size=most)) if held else []
        return [(row, data.draw(st.integers(0, held[row]))) for row in rows]

    @rule(data=st.data(), new=st.integers(0, 2), stays=st.booleans())
    def begin(self, data, new, stays):
        """Some rows go on as what is held, up to some token, and others are new; other rows are parked, or those that are."""
        rows = self._sources(data, 0, 3) + [(-1, 0)] * new or [(-1, 0)]
        park = None if stays else self._sources(data, 0, 3)
        self.driver.begin(rows, park)
        self.driver.forward(ragged(data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)).filter(any))))

    @precondition(room)
    @rule(steps=st.integers(1, 4))
    def decode(self, steps):
        for _ in range(steps):
            self.driver.decode()

    @precondition(room)
    @rule(data=st.data())
    def fork_and_crop(self, data):
        """As beam search does, beside parked rows."""
        self.driver.select(data.draw(st.lists(st.integers(0, len(self.driver.lens) - 1), min_size=1, max_size=3)))
        self.driver.crop([data.draw(st.integers(0, n)) for n in self.driver.lens])
        self.driver.forward(ragged([1 + i for i in range(len(self.driver.lens))]))

    @precondition(running)
    @rule()
    def poison(self):
        poison(self.driver)

    @precondition(running)
    @rule()
    def reset(self):
        self.driver.reset()

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "driver"):
            all_of(self.driver)


TestParkedLives = ParkingMachine.TestCase
TestParkedLives.settings = settings(
    max_examples=400 if LONG else 10,
    stateful_step_count=30 if LONG else 8,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
