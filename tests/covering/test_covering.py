"""Every pair of settings: it runs and is right, or the rule that is written down refuses it."""

from functools import partial

import pytest

from pikv_ds.blueprint.facts import Facts
from pikv_ds.blueprint.rules import BY_NAME
from pikv_ds.config.blocks import Blocks

from .array import all_pairs, cover, pairs_of
from .asked import refusal
from .book import read
from .driver import run
from .settings import EXPERTS, blocks, defaults, layers_of

RUNS, REFUSED = read()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


def changes(case) -> str:
    return " ".join(f"{name}={value}" for name, value in case.items() if value != defaults()[name]) or "defaults"


def test_every_pair_is_there():
    covered = set().union(*map(pairs_of, RUNS))
    apart = set().union(*(pairs_of(case) for case, _ in REFUSED))
    assert set(all_pairs()) == covered | apart


@pytest.mark.parametrize("case", RUNS, ids=changes)
def test_what_combines_is_right(case, folder):
    right = run(case, folder)
    assert not right.everything or right.linear or right.exact + right.bounded, "nothing was compared"


def test_what_is_refused_is_refused_by_its_rule(folder):
    found = [(case, refusal(case, folder)) for case, _ in REFUSED]
    assert found == REFUSED


def test_a_rule_names_the_blocks_that_do_not_combine(folder):
    """With these blocks alone it refuses as well; with one of them as it is by default it has nothing to say."""
    for case, name in REFUSED:
        block, rule = blocks(case, folder), BY_NAME[name]
        alone = {key: block[key] for key in rule.blocks}
        assert _says(rule, alone, case), f"{changes(case)}: {name} needs more than {rule.blocks}"
        for key in rule.blocks if len(rule.blocks) > 1 else ():
            others = {other: value for other, value in alone.items() if other != key}
            assert not _says(rule, others, case), f"{changes(case)}: {name} refuses without {key}"


def _says(rule, block: dict, case) -> str | None:
    facts = Facts.of(Blocks(**block), layers=tuple(layers_of(case)), num_experts=EXPERTS)
    return rule.says(facts)


@pytest.mark.slow
def test_the_array_is_the_one_that_is_made(folder):
    runs, refused = cover(partial(refusal, folder=folder))
    assert runs == RUNS
    assert sorted(refused, key=str) == sorted(REFUSED, key=str)
