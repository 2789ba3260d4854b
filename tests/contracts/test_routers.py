"""What every registered KV router keeps."""

import inspect

import pytest
import torch

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import Router
from tests.unit.driver import Driver, layer, ragged

pytestmark = pytest.mark.parametrize("name", ROUTERS.names())


def routing(name: str, **more) -> dict:
    budget = {} if ROUTERS.build(name).reads_all else {"budget_pages": 4, "sink_tokens": 2, "recent_tokens": 5}
    return {"method": name, **budget, **more}


class Unchecked(Driver):
    """Keeps the outputs and compares nothing: a router may read less than dense attention does."""

    def _compare(self, i, q, positions, out, lse) -> None:
        real = positions >= 0
        assert bool(out[real].isfinite().all()) and bool(lse[real].isfinite().all())


def outputs(name: str, num_shards: int = 2) -> list:
    driver = Unchecked([layer(0), layer(1, window=24)], routing=routing(name), num_shards=num_shards, placement="position")
    driver.prefill([40, 23])
    found = [driver.forward(ragged([5, 5]))]
    driver.select([1, 1, 0])
    found += [driver.forward(torch.ones(3, 1, dtype=torch.bool)) for _ in range(9)]
    driver.prefill([9])
    return [*found, driver.forward(torch.ones(1, 1, dtype=torch.bool))]


def test_is_described(name):
    cls = ROUTERS.get(name)
    assert issubclass(cls, Router) and cls.name == name
    assert len(inspect.getdoc(cls).splitlines()) > 2, "what is read, by which formula, from which source"


def test_rows_that_grow_fork_and_start_anew(name):
    """Finite throughout, and twice the same: nothing depends on the state of a random generator."""
    first, second = outputs(name), outputs(name)
    for forward, again in zip(first, second, strict=True):
        for (out, lse), (out_again, lse_again) in zip(forward, again, strict=True):
            assert torch.equal(out, out_again) and torch.equal(lse, lse_again)
