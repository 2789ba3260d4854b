"""Presets: data that the configuration accepts, replaced by its keys, overridden by what stands beside it."""

import json

import pytest

from pikv_ds.adapters.hf.model_spec import load_model_config, read_model_spec
from pikv_ds.bundled import model_path
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.config.presets import PRESETS, overlay
from pikv_ds.errors import ConfigError
from pikv_ds.launch.cli import main
from tests.calibrations import random_calibration


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    file = tmp_path_factory.mktemp("calibration") / "bundled.safetensors"
    random_calibration(read_model_spec(load_model_config(model_path()))).save(file)
    return str(file)


def filled(needs, file):
    return {key: filled(value, file) if isinstance(value, dict) else file for key, value in (needs or {}).items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_for_its_keys(name, calibration):
    beside = filled(PRESETS[name].needs, calibration)
    config = PiKVConfig.parse({"preset": name, **beside})
    assert config == PiKVConfig(**overlay(PRESETS[name].block, beside)) and config.preset is None
    assert config == PiKVConfig.parse(config.model_dump(mode="json")) == PiKVConfig.parse(config.model_dump(exclude_defaults=True))


def test_a_preset_that_needs_a_calibration_says_so():
    with pytest.raises(ConfigError, match="pikv.compression.calibration = None: legal is a value: method 'lora' needs it"):
        PiKVConfig.parse({"preset": "paper_c"})


def test_recommended_presets_change_something_and_differ():
    blocks = [PiKVConfig(preset=name) for name in ("accurate", "balanced", "small", "paper_g")]
    assert len({config.model_dump_json() for config in blocks}) == 4
    assert blocks[-1] == PiKVConfig()


def test_the_authors_configurations_carry_their_claims():
    theirs = {name: preset for name, preset in PRESETS.items() if name.startswith("paper_")}
    assert theirs and all(preset.claimed_drop_pct and preset.claimed_ratio for preset in theirs.values())
    assert not any(preset.claimed_ratio for name, preset in PRESETS.items() if name not in theirs)


def test_keys_beside_a_preset_override_it():
    config = PiKVConfig.parse({"preset": "paper_f", "page_size": 8, "scheduling": {"budget_ratio": 0.25}})
    assert (config.page_size, config.scheduling.method, config.scheduling.budget_ratio) == (8, "duo", 0.25)
    config = PiKVConfig.parse({"pikv": {"preset": "paper_f", "scheduling": {"method": "h2o", "budget_tokens": 128}}})
    assert (config.scheduling.budget_ratio, config.scheduling.budget_tokens) == (None, 128), "a method of its own replaces the block"
    assert PRESETS["paper_f"].block["scheduling"]["budget_ratio"] == 0.5, "presets are not written to"


def test_overlay():
    assert overlay({"a": {"b": 1, "c": {"d": 2}}, "e": 3}, {"a": {"c": {"f": 4}}, "e": None}) == {
        "a": {"b": 1, "c": {"d": 2, "f": 4}},
        "e": None,
    }


@pytest.mark.parametrize("given", ["balance", "", 3, ["small"]])
def test_unknown_presets_are_refused_with_the_list(given):
    with pytest.raises(ConfigError, match="pikv.preset = .*: legal is one of 'accurate', 'balanced', 'small', 'paper_a'"):
        PiKVConfig.parse({"preset": given})


def test_config_check_shows_the_expansion(tmp_path, capsys):
    file = tmp_path / "pikv.json"
    file.write_text('{"pikv": {"preset": "small", "page_size": 64}}')
    assert main(["config", "--check", str(file)]) == 0
    shown = json.loads(capsys.readouterr().out)["pikv"]
    assert PiKVConfig.parse(shown) == PiKVConfig(preset="small", page_size=64) and shown["compression"]["method"] != "none"


def test_the_schema_lists_the_presets():
    assert set(PRESETS) < set(PiKVConfig.model_json_schema()["properties"]["preset"]["enum"])
