"""PiKVCache with compressed pages, against dense attention in float64 on entries that the formats store without loss.

So every difference is an entry that is missing, read twice or read from the wrong place: an open group whose raw keys were lost, a crop
into an encoded group, a fork that shares a tail, a chunk that reads the tail of its own tokens.
"""

import pytest
import torch

from tests.harness.checks import Answers, Dense
from tests.harness.dense import dense_rows, rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.invariants import check_directory, check_pages, check_unshared

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

KINDS = [layer(0, dim=16), layer(1, dim=16, window=70), layer(2, dim=16, latent=True)]
CODECS = ["int8", "int4", "fp8_e4m3"]


def check(driver: Driver) -> None:
    for pool in driver.probe.all_pools:
        check_pages(pool)
        check_unshared(pool)
    if driver.cache.num_shards > 1:
        check_directory(driver)


@pytest.mark.parametrize("expert_ids", ["previous_layer", "true"])
@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
@pytest.mark.parametrize("codec", CODECS)
def test_chunks_and_decoding_cross_groups(codec, num_shards, expert_ids):
    driver = Driver(KINDS, page_size=64, num_shards=num_shards, codec=codec, expert_ids=expert_ids)
    driver.prefill([62, 1, 150])
    masks = [
        ragged([3, 3, 3]),
        ragged([0, 40, 7]),
        ragged([70, 63, 2], left=False),
        *[ragged([1, 1, 1])] * 5,
        ragged([1, 0, 1]),
        ragged([34, 40, 1]),
    ]
    for mask in masks:
        driver.forward(mask)
        check(driver)


@pytest.mark.parametrize("page_size", [64, 128], ids="page{}".format)
@pytest.mark.parametrize("codec", CODECS)
def test_forks_and_crops_keep_the_open_group(codec, page_size):
    """Crops inside the open group, to its start, and back into groups that are encoded; forks that go on differently."""
    driver = Driver([KINDS[0], KINDS[2]], page_size=page_size, num_shards=2, codec=codec)
    driver.prefill([300, 140])
    for index, keep in (([0, 0, 1], [300, 297, 139]), ([0, 1, 2], [260, 128, 3]), ([2, 1, 1, 0], [2, 129, 70, 256])):
        driver.select(index)
        driver.crop(keep)
        for mask in (ragged([1] * len(index)), ragged([5 + 30 * i for i in range(len(index))]), ragged([1] * len(index))):
            driver.forward(mask)
            check(driver)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_lost_bits_stay_lost_but_bounded(codec):
    """Random entries: the error is not zero (the codes are read) and stays within what the format declares."""
    driver = Driver([layer(0, dim=32)], page_size=64, codec=codec)
    driver.steps, answers = None, driver.without(Dense).add(Answers())
    driver.prefill([400])
    driver.decode()
    (q, positions, out, _), spec = answers.found[-1], driver.layers[0]
    want, _ = dense_rows(q[0], positions[0], driver.history[0][0], driver.scale(q), spec.window)
    fmt = driver.probe.formats[0]
    error = rel_error(out[0], want)
    assert 1e-4 < error <= fmt.k_rel_error * 4 + fmt.v_rel_error, error
    assert torch.isfinite(out).all()
