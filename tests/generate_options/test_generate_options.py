"""Options of generate(): every one has a row in the table, and what the rows say is what happens."""

import json

import pytest

from tests.long_form import LONG

from .cases import names_what_it_refuses
from .drive import outcomes
from .programs import case_of
from .random_results import is_right
from .table import SETTINGS, TRIES, cases, known
from .table_results import FILE, kept

SHORT = {
    1: {"num_beams", "cache_implementation", "output_attentions", "past_key_values", "guidance_scale", "attention_mask"},
    2: {"prefill_chunk_size", "use_cache", "stop_strings", "custom_generate", "assistant_early_exit", "stopping_criteria"},
}
"""By the number of ranks."""
RANDOM = 1000 if LONG else 4
"""For each number of ranks."""
ONCE_WRONG = {1: [1126], 2: [53, 671]}


@pytest.fixture(scope="module")
def written():
    return json.loads(FILE.read_text(encoding="utf-8"))["tries"]


def test_every_option_has_a_row():
    assert not known() - set(TRIES), "options of the pinned transformers that the table does not try"
    assert all(option in options or option in ("inputs",) for option, tries in TRIES.items() for options in tries)


def test_results_are_of_this_table(written):
    assert set(written) == set(cases())


def test_no_row_is_wrong(written):
    for name, row in written.items():
        assert row["status"] in ("served", "refused", "same error"), name
        assert row["status"] != "refused" or names_what_it_refuses(cases()[name], row["says"]), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", sorted({ranks for ranks, _ in SETTINGS}))
def test_what_the_rows_say_happens(ranks, written):
    chosen = {name: case for name, case in cases().items() if len(case["ranks"]) == ranks}
    if not LONG:
        chosen = {name: case for name, case in chosen.items() if name.split("/")[0] in SHORT[ranks] and case["requests"] == "distinct"}
    found = kept(dict(outcomes(chosen, ranks)))["tries"]
    assert {name: row["status"] for name, row in found.items()} == {name: written[name]["status"] for name in chosen}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_options_composed_at_random(ranks):
    chosen = {str(seed): case_of(seed, ranks) for seed in (*range(ranks - 1, 2 * RANDOM, 2), *ONCE_WRONG[ranks])}
    wrong = {seed: outcome for seed, outcome in outcomes(chosen, ranks) if not is_right(chosen[seed], outcome)}
    assert not wrong
