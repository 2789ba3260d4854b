"""A cache in any mixture of torch's modes: nothing that it keeps is an inference tensor, and it answers as it does without them.

The cases are those of the covering array. Every call of the cache runs in a mode of its own, drawn from a seed; in the
long form all of them.
"""

import random
from functools import partial

import pytest
import torch

from pikv_ds.cache.cache import PiKVCache
from tests.covering import driver as covering
from tests.covering.book import read
from tests.covering.test_covering import changes
from tests.held import paths
from tests.long_form import short_or_long
from tests.torch_defaults import double_by_default

RUNS = read()[0]


MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad, double_by_default, partial(torch.autocast, "cpu", torch.bfloat16))
CALLS = ("__init__", "reset", "begin_step", "attend", "end_step")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


# Of the array: those with most parts that keep something of their own (bases, a router and a policy that watch, windows, late experts).
SHORT = [i for i, case in enumerate(RUNS) if case["policy"] != "none" and case["router"] != "all" and case["expert_ids"] != "hash"][:6]
SHORT += [i for i, case in enumerate(RUNS) if case["codec"] == "svd"][:2]


@pytest.mark.parametrize("index", short_or_long(SHORT, list(range(len(RUNS)))), ids=lambda i: changes(RUNS[i]))
def test_modes_may_change_between_any_two_calls(index, folder, monkeypatch):
    draw, made = random.Random(index), []

    def in_a_mode(name):
        call = getattr(PiKVCache, name)

        def run(cache, *args, **kwargs):
            made[:] = [cache]
            with draw.choice(MODES)():
                return call(cache, *args, **kwargs)

        return run

    for name in CALLS:
        monkeypatch.setattr(PiKVCache, name, in_a_mode(name))
    right = covering.run(RUNS[index], folder)
    assert not right.everything or right.linear or right.exact + right.bounded, "nothing was compared"
    kept = [path for path, tensor in paths(made[0]) if tensor.is_inference() or tensor.requires_grad]
    assert not kept, f"can't be changed outside of inference mode: {kept}"
