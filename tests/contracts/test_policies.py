"""What every registered retention policy keeps."""

import inspect

import pytest
import torch

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import PageStats, RetentionPolicy


def stats(requests, pages):
    seqlens = torch.full((requests, pages), 16, dtype=torch.int32)
    last = torch.arange(pages, dtype=torch.int32).mul(16).add(15).expand(requests, pages)
    return PageStats(seqlens=seqlens, last_position=last)


@pytest.mark.parametrize("name", POLICIES.names())
@pytest.mark.parametrize("requests, pages", [(0, 4), (1, 1), (3, 5)])
def test_scores_are_one_comparable_number_per_page(name, requests, pages):
    cls = POLICIES.get(name)
    assert issubclass(cls, RetentionPolicy) and cls.name == name and inspect.getdoc(cls)
    score = POLICIES.build(name).score(stats(requests, pages))
    assert score.shape == (requests, pages) and score.dtype == torch.float32
    assert not score.isnan().any()


def test_none_never_evicts():
    assert POLICIES.build("none").score(stats(2, 3)).eq(torch.inf).all()
