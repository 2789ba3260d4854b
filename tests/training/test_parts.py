"""What every registered part keeps: parity of its module and its method is tested beside the part itself."""

import inspect
import json

import pytest
import torch

from pikv_ds.training.part import LearnedPart
from pikv_ds.training.parts import PARTS
from tests.training.windows import engine_of, facts, window

pytestmark = pytest.mark.parametrize("name", PARTS.names())
SMALL = {"kv_gate": {"page_size": 4, "queries": 16}, "eviction_scorer": {"page_size": 4, "hidden": 6}}
"""Options with which a part can learn from windows of 48 tokens."""


def part_of(name: str) -> LearnedPart:
    return PARTS.build(name, **SMALL.get(name, {}))


def test_is_described(name):
    cls = PARTS.get(name)
    assert issubclass(cls, LearnedPart) and cls.name == name and " = " in cls.serves
    assert len(inspect.getdoc(cls).splitlines()) > 2, "what is learned, on which loss"


def test_options_are_keywords_that_rebuild_it(name):
    parameters = list(inspect.signature(PARTS.get(name).__init__).parameters.values())[1:]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
    options = json.loads(json.dumps(part_of(name).options()))
    assert PARTS.build(name, **options).options() == options


def test_the_loss_moves_every_weight_and_repeats(name):
    part = part_of(name)
    engine = engine_of(part, 5)
    first = engine.weights()
    for _ in range(2):
        found = [engine.loss(window(1, asks=True), torch.Generator().manual_seed(4)) for _ in range(2)]
        assert all(torch.equal(x, found[1][key]) for key, x in found[0].items()) and "loss" in found[0]
        assert all(x.dim() == 0 and bool(torch.isfinite(x)) for x in found[0].values())
        engine.backward(found[0]["loss"], 1)
        engine.step()
    still = [key for key, x in engine.weights().items() if torch.equal(x, first[key])]
    assert not still, f"no gradient reaches {still}"


def test_the_held_out_objective_has_no_gradient(name):
    found = engine_of(part_of(name), 5).loss(window(2, asks=True), None)
    assert "objective" in found and all(x.dim() == 0 and not x.requires_grad for x in found.values())


def test_the_module_is_built_from_the_generator_alone(name):
    first, second = (engine_of(part_of(name), 5).weights() for _ in range(2))
    assert all(torch.equal(x, second[key]) for key, x in first.items())
    assert set(first) == set(part_of(name).build(facts()).state_dict())
