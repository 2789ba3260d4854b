"""The survey in its short form, families that no other test has; what its rows and its rule promise. `python -m tests.survey`: all."""

import json

import pytest
import transformers
from transformers.cache_utils import get_layer_types_and_kwargs

from tests.long_form import short_or_long

from .compare import survey
from .configs import FAMILIES, tiny_config
from .results import NEWEST, RESULTS, SURVEYED

RECORD = json.loads(RESULTS.read_text(encoding="utf-8"))
ROWS = RECORD["rows"]
SHORT = {
    "gemma4": "layers that run for the last tokens alone; a composite configuration",
    "mimo_v2_flash": "values narrower than keys, sinks in some layers",
    "longcat_flash": "two latents and one router in a layer",
    "gpt_bigcode": "one kv head, by another name",
    "bart": "a decoder with cross-attention that nobody asks for",
}
SERVED = [row["family"] for row in ROWS if row["outcome"] == "served"]
REFUSED = [row["family"] for row in ROWS if row["outcome"] == "refused"]


@pytest.mark.parametrize("family", short_or_long(list(SHORT), SERVED))
def test_a_family_is_served(family):
    row = survey(family)
    assert row["outcome"] == "served", row["why"]


@pytest.mark.parametrize("family", short_or_long(["jetmoe"], REFUSED))
def test_a_family_is_refused_by_name(family):
    row = survey(family)
    assert row["outcome"] == "refused" and row["why"].startswith(("UnsupportedError: ", "ConfigError: ")), row


def test_the_committed_rows_are_of_all_families_and_none_is_wrong():
    if transformers.__version__ == RECORD["versions"]["transformers"]:
        assert [row["family"] for row in ROWS] == FAMILIES
    outcomes = [row["outcome"] for row in ROWS]
    assert "wrong" not in outcomes and set(outcomes) <= {*SURVEYED, "not in it"}
    assert outcomes.count("served") >= 125
    assert all(row["why"] for row in ROWS if row["outcome"] != "served")


def test_the_rows_of_the_newest_version_are_families_of_its_own_and_none_is_wrong():
    record = json.loads(NEWEST.read_text(encoding="utf-8"))
    assert not {row["family"] for row in record["rows"]} & {row["family"] for row in ROWS}
    assert {row["outcome"] for row in record["rows"]} <= {"served", "refused", "not in it"}


def test_the_rule_keeps_every_kind_of_layer():
    kinds = set(get_layer_types_and_kwargs(tiny_config("qwen3_next"))[0])
    assert kinds == {"linear_attention", "full_attention"}
    small = tiny_config("deepseek_v3")
    assert small.num_hidden_layers == 2 and small.vocab_size == 128 and small.kv_lora_rank == 16
