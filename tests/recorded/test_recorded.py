"""The short form of the recorded outcomes, on 1 and 2 ranks; that a difference is seen, and what is compared on which machine.

All cases: python -m tests.recorded
"""

import copy
from dataclasses import replace

import pytest

from tests.recorded import book
from tests.recorded.cases import CASES
from tests.recorded.compare import differences
from tests.recorded.job import outcome
from tests.recorded.runner import record

SHORT = [name for name, case in CASES.items() if case.short and case.world < 4]
EXACT_CASE = CASES["core plain w2"]
SCORED_CASE = CASES["core quest w2"]


@pytest.fixture(scope="module")
def recorded() -> dict:
    return book.read()


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[dict]]:
    return record([CASES[name] for name in SHORT])[0]


@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SHORT)
def test_as_recorded(name: str, outcomes, recorded):
    lines = differences(CASES[name], outcomes[name], recorded["cases"][name], same_machine=recorded["machine"] == book.machine())
    assert not lines, "\n".join(lines)


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_configuration_that_is_refused():
    """What is expected of a setting that was deleted: an error that says so."""
    told = "legal keys of pikv.routing with method 'bounds'"
    case = replace(EXACT_CASE, config={"routing": {"method": "bounds", "granularity": "token"}}, refused=told)
    found = record_as(case)
    assert differences(case, found, None, same_machine=True) == []
    other = replace(case, refused="use page_size 1")
    assert differences(other, found, None, same_machine=True)[0].startswith("expected an error with 'use page_size 1', got unknown key")
    unexpected = replace(case, refused=None)
    assert differences(unexpected, found, found, same_machine=True)[0].startswith("refused: unknown key pikv.routing.granularity")


def record_as(case) -> list[dict]:
    """The outcome of a case that is not among CASES, in this process."""
    return [outcome(case, None)]


def test_a_case_that_accepts_what_it_should_refuse(recorded):
    case = replace(EXACT_CASE, refused="use page_size 1")
    assert differences(case, recorded["cases"][case.name], None, same_machine=True) == [
        "expected an error with 'use page_size 1', got none"
    ]


def changed(ranks: list[dict], rank: int, *path, to) -> list[dict]:
    made = copy.deepcopy(ranks)
    owner = made[rank]
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = to
    return made


CHANGES = {  # a change on rank 1, and whether it is a difference on the recorded machine, on another, on another where scores decide
    "digest": (("digest",), "0", (True, False, False)),
    "a sample within the tolerance": (("samples", 3), lambda old: old + 2e-5, (True, False, False)),
    "a sample beyond it": (("samples", 3), lambda old: old + 1e-2, (True, True, False)),
    "not a number": (("samples", 3), float("nan"), (True, True, False)),
    "kept": (("kept", "digest"), "0", (True, True, False)),
    "bytes": (("numbers", "kv_bytes_allocated"), lambda old: old + 1, (True, True, False)),
    "appended": (("numbers", "entries_appended"), lambda old: old + 1, (True, True, True)),
    "a collective": (("collectives", "all_gather", 0), lambda old: old + 1, (True, True, False)),
    "the name of the kernels": (("numbers", "attention_impl"), "pikv torch fp32", (True, False, False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_a_difference_and_where(change: str, recorded):
    path, to, seen = CHANGES[change]
    for case, same_machine, differs in zip((EXACT_CASE, EXACT_CASE, SCORED_CASE), (True, False, False), seen, strict=True):
        known = recorded["cases"][case.name]
        old = known[1]
        for key in path:
            old = old[key]
        found = changed(known, 1, *path, to=to(old) if callable(to) else to)
        lines = differences(case, found, known, same_machine)
        assert bool(lines) == differs, (case.name, same_machine, lines)
        assert all(line.startswith("rank 1: ") for line in lines)
        assert differences(case, known, known, same_machine) == []


def test_an_error_a_missing_rank_and_a_case_without_a_record(recorded):
    known = recorded["cases"][EXACT_CASE.name]
    broken = [known[0], {"error": "Traceback\nValueError: what"}]
    assert differences(EXACT_CASE, broken, known, same_machine=True) == ["raised: ValueError: what"]
    assert differences(EXACT_CASE, known[:1], known, same_machine=True) == ["1 ranks, recorded were 2"]
    assert differences(EXACT_CASE, known, None, same_machine=True) == ["nothing is recorded under this name"]


def test_every_case_is_recorded_and_no_other(recorded):
    assert list(recorded["cases"]) == [name for name, case in CASES.items() if case.refused is None]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused is None])
def test_a_case_does_what_it_is_there_for(name: str, recorded):
    """A router that leaves nothing out, a budget that evicts nothing, a window that demotes nothing would guard nothing."""
    case, ranks = CASES[name], recorded["cases"][name]
    total = lambda field: sum(rank["numbers"][field] for rank in ranks)  # noqa: E731
    assert total("entries_appended") > 0
    if "scheduling" in case.config:
        assert total("entries_evicted") > 0
    if "routing" in case.config:
        read, visible = (sum(rank["read"][f"entries_{what}"] for rank in ranks) for what in ("read", "visible"))
        assert read < 0.9 * visible
    compression = case.config.get("compression", {})
    if "raw_recent_tokens" in compression or compression.get("method") == "adaptive":
        pools = [layer[1] for rank in ranks for layer in rank["kept"]["counts"] if len(layer) == 2]
        assert sum(entries for pool in pools for row in pool for entries in row) > 0, "nothing was demoted"
    if "crop" in name and case.host == "core" or "assisted" in name:
        assert total("entries_cropped") > 0
    if "spill" in name:
        assert total("spilled") > 20
    if case.world > 1:
        assert all(rank["collectives"] for rank in ranks)
        assert {rank["numbers"]["requests"] for rank in ranks} <= {"replicated", "distinct"}
