"""What every registered KV router keeps."""

import inspect

import pytest
import torch

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import Router


@pytest.mark.parametrize("name", ROUTERS.names())
@pytest.mark.parametrize("tokens, shards", [(0, 2), (1, 1), (5, 4)])
def test_route_is_a_mask_over_shards(name, tokens, shards):
    cls = ROUTERS.get(name)
    assert issubclass(cls, Router) and cls.name == name and inspect.getdoc(cls)
    chosen = ROUTERS.build(name).route(torch.randn(tokens, 8, 32), torch.randn(shards, 3, 2, 32))
    assert chosen.shape == (tokens, shards) and chosen.dtype == torch.bool


def test_all_reads_everything():
    assert ROUTERS.build("all").route(torch.randn(3, 4, 8), torch.randn(2, 1, 4, 8)).all()
