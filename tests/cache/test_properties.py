"""Random lives of one PiKVCache: whatever rows do, attention is dense and nothing is lost. PIKV_HYPOTHESIS=long searches longer."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.harness.driver import Driver, layer, ragged
from tests.harness.invariants import check, poison

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
LONG = os.environ.get("PIKV_HYPOTHESIS") == "long"
MAX_ROWS, MAX_TOKENS = 5, 60


class CacheMachine(RuleBasedStateMachine):
    """Moves of rows wait for the next forward, so a move and the forward that makes it real are one rule."""

    @initialize(
        page_size=st.sampled_from([1, 2, 3, 8, 32]),
        num_shards=st.sampled_from([1, 2, 4]),
        placement=st.sampled_from(["experts", "xor", "position"]),
        expert_ids=st.sampled_from(["previous_layer", "true"]),
        capacity=st.sampled_from([None, 100]),
        window=st.integers(2, 12),
        group=st.sampled_from([1, 4]),
        hot=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def start(self, page_size, num_shards, placement, expert_ids, capacity, window, group, hot, seed):
        kinds = [layer(0, num_kv_heads=4 // group), layer(1, num_kv_heads=4 // group, window=window), layer(2, latent=True)]
        self.window = window
        self.driver = Driver(
            kinds,
            page_size=page_size,
            num_shards=num_shards,
            placement=placement,
            expert_ids=expert_ids,
            seed=seed,
            capacity_tokens=None if capacity is None else MAX_ROWS * (MAX_TOKENS + 12) // num_shards + 1,
        )
        self.driver.skewed = hot

    def running(self) -> bool:
        return not self.driver.fresh

    def room(self) -> bool:
        return self.running() and max(self.driver.lens) < MAX_TOKENS

    @rule(num_new=st.lists(st.integers(1, 20), min_size=1, max_size=3), left=st.booleans())
    def prefill(self, num_new, left):
        self.driver.prefill(num_new, left)

    @precondition(room)
    @rule(steps=st.integers(1, 4))
    def decode(self, steps):
        for _ in range(steps):
            self.driver.decode()

    @precondition(room)
    @rule(data=st.data(), left=st.booleans())
    def chunk(self, data, left):
        """Several tokens per row; some rows may get none."""
        rows = len(self.driver.lens)
        self.driver.forward(ragged(data.draw(st.lists(st.integers(0, 12), min_size=rows, max_size=rows).filter(any)), left))

    @precondition(room)
    @rule(data=st.data())
    def fork_then_decode(self, data):
        parents = data.draw(st.lists(st.integers(0, len(self.driver.lens) - 1), min_size=1, max_size=MAX_ROWS))
        self.driver.select(parents)
        self.driver.decode()

    @precondition(room)
    @rule(data=st.data())
    def crop_then_chunk(self, data):
        """Rows that a window layer has not yet dropped anything of may be cut anywhere, with or without a fork."""
        parents = data.draw(st.lists(st.integers(0, len(self.driver.lens) - 1), min_size=1, max_size=MAX_ROWS))
        self.driver.select(parents)
        settled = [self.driver.probe.uncroppable(parent) for parent in parents]
        lowest = [0 if at < self.window else at for at in settled]
        self.driver.crop([data.draw(st.integers(low, n)) for low, n in zip(lowest, self.driver.lens, strict=True)])
        self.driver.forward(ragged([1 + i for i in range(len(parents))]))

    @precondition(room)
    @rule(data=st.data(), width=st.integers(2, 6))
    def assisted(self, data, width):
        """Announce, run several columns, take some of them back, go on: twice, as assisted decoding does."""
        self.driver.announce_crops()
        for _ in range(2):
            self.driver.forward(torch.ones(len(self.driver.lens), width, dtype=torch.bool))
            check(self.driver)
            self.driver.crop([n - data.draw(st.integers(0, width - 1)) for n in self.driver.lens])
        self.driver.decode()
        self.driver.end_crops()

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
        if hasattr(self, "driver") and not self.driver.touched:
            check(self.driver)


TestCacheLives = CacheMachine.TestCase
TestCacheLives.settings = settings(
    max_examples=400 if LONG else 40,
    stateful_step_count=40 if LONG else 16,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
