"""Every rule refuses something, under its own name and no other's, at the moment that it says; and nothing that combines."""

import json
import re

import pytest

from pikv_ds.blueprint.rules import BY_NAME, RULES
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.launch.cli import main
from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import RetentionPolicy
from pikv_ds.pools import POOLS
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.random import RandomPages
from tests.aged import Aged

from .refused import planned, read, refused


class KeepsSummaries(RandomPages):
    """A router that some rules are for: none of this package is like it."""

    summarises = True


class KeepsQueries(RetentionPolicy):
    name, observes_queries = "keeps_queries", True

    def score(self, pages):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def methods_that_rules_are_for(monkeypatch):
    monkeypatch.setitem(ROUTERS._classes, "keeps_summaries", KeepsSummaries)
    monkeypatch.setitem(POLICIES._classes, "keeps_queries", KeepsQueries)
    monkeypatch.setitem(POOLS._classes, "aged", Aged)


def test_every_rule_has_a_name_and_words():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names) == len(BY_NAME)
    for rule in RULES:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)+", rule.name)
        assert rule.blocks and set(rule.blocks) <= set(PiKVConfig.model_fields)
        assert all(rule[3:6]), rule.name


@pytest.mark.parametrize("name", BY_NAME)
def test_a_rule_refuses(name, tmp_path):
    for case in refused(tmp_path)[name]:
        with pytest.raises(ConfigError) as caught:
            config = read(case)
            assert BY_NAME[name].looks_at == "model", "refused later than it says"
            planned(config, case)
        assert caught.value.rule == name, str(caught.value)
        assert "pikv." in str(caught.value) and len(str(caught.value)) > 40


def test_every_case_is_of_a_rule(tmp_path):
    assert set(refused(tmp_path)) == set(BY_NAME)


def test_what_is_no_combination_names_no_rule():
    for block in ({"page_size": 0}, {"routing": {"method": "nowhere"}}, {"compression": {"method": "int8", "group": 7}}):
        with pytest.raises(ConfigError) as caught:
            PiKVConfig(**block)
        assert caught.value.rule is None


def test_the_rules_are_printed(capsys, tmp_path):
    assert main(["config", "--rules", "--json", str(tmp_path / "rules.json")]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "rules.json").read_text())["rows"]
    assert [row["rule"] for row in rows] == [rule.name for rule in RULES]
    assert all(name in shown for name in BY_NAME)
