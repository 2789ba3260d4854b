"""`pikv sweep`: the committed sweeps cover the registries and parse; workers measure, answer, resume, and say what is wrong."""

import json
import re
from pathlib import Path

import pytest

from pikv_ds.codecs import CODECS
from pikv_ds.config.presets import PRESETS
from pikv_ds.errors import ConfigError
from pikv_ds.launch.cli import build_parser, main
from pikv_ds.launch.commands.sweep import SWEEPS as FOLDER
from pikv_ds.launch.evaluation.partial import Partial, key_of
from pikv_ds.launch.evaluation.plan import read_spec
from pikv_ds.launch.evaluation.spec import Unit
from pikv_ds.launch.evaluation.sweep import files_needed, items_of, read_sweep
from pikv_ds.launch.evaluation.workers import measure_all
from pikv_ds.policies import POLICIES
from pikv_ds.routers import ROUTERS
from tests.launch.test_methods import row

METHODS = FOLDER / "methods.json"
SWEEPS = [file for file in sorted(FOLDER.glob("*.json")) if "families" in json.loads(file.read_text())]
REGISTRIES = {"compression": CODECS, "routing": ROUTERS, "scheduling": POLICIES}
SHORT = {"context": 256, "samples": 2, "batch": 2}


def small(folder, **family) -> Path:
    entries = [{"label": "four bits", "pikv": {"compression": {"method": "int4"}}, "beside": "raw"}, {"label": "raw", "pikv": {}}]
    runs = [{"options": SHORT, "tasks": ["bytes"]}]
    file = folder / "sweep.json"
    file.write_text(json.dumps({"families": {"own": {"runs": runs, "entries": entries} | family}}))
    return file


def parse(words):
    return build_parser().parse_args(words)


@pytest.mark.parametrize("family", REGISTRIES)
def test_every_registered_method_has_an_entry(family):
    entries = read_sweep(METHODS)["families"][family]["entries"]
    absent = set(REGISTRIES[family].names()) - {entry["pikv"].get(family, {}).get("method") for entry in entries}
    assert not absent, f"launch/sweeps/methods.json, family {family}: no entry for {', '.join(sorted(absent))}"


def test_every_preset_has_an_entry():
    entries = read_sweep(METHODS)["families"]["presets"]["entries"]
    assert {entry["pikv"].get("preset") for entry in entries} == set(PRESETS)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_committed_sweeps_can_be_planned(file):
    document = read_sweep(file)
    made = files_needed(document, None, False)
    assert all(command[0] in ("python", "pikv") and "{file}" in command for command in made.values())
    for name, family in document["families"].items():
        # What needs a file of the sweep is planned when that is there.
        left = {"runs": "runs", "entries": "entries"}
        family |= {key: [x for x in family[key] if not re.search(r'"\{\w', json.dumps(x))] for key in left}
        items = items_of({"families": {name: family}}, None, False, parse, {})
        assert len(items) >= len(family["entries"]) and items[0].unit.block is None, "the dense cache comes first"


def test_entries_are_measured_in_every_run_and_dense_once(tmp_path):
    runs = [
        {"options": SHORT, "tasks": ["ppl"], "pikv": {"page_size": 64, "scheduling": {"prefill": "evict", "recent_tokens": 16}}},
        {"options": SHORT, "tasks": ["recall"], "of": ["evicts"]},
    ]
    evicts = {"label": "evicts", "pikv": {"scheduling": {"method": "random", "budget_ratio": 0.5, "recent_tokens": 32}}}
    document = read_sweep(small(tmp_path, runs=runs, entries=[evicts, {"label": "raw", "pikv": {}, "beside": "evicts"}]))
    items = items_of(document, None, False, parse, {})
    assert [(item.family, item.label, item.unit.task) for item in items] == [
        (None, "dense", "ppl"), ("own", "evicts", "ppl"), ("own", "raw", "ppl"), (None, "dense", "recall"), ("own", "evicts", "recall"),
    ]  # fmt: skip
    ppl, recall = items[1].unit.block, items[4].unit.block
    assert ppl["page_size"] == 64 and recall["page_size"] is None
    assert [block["scheduling"]["recent_tokens"] for block in (ppl, recall)] == [32, 32], "the entry's own keys win"


def test_the_committed_sweep_runs_quickly_on_two_workers(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert main(["sweep", "--quick", "--only", "compression", "--workers", "2", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    rows = {(row["detail"]["label"], row["task"], row["detail"]["model"]): row for row in document["rows"]}
    tasks = [("ppl", "bundled"), ("recall", "bundled"), ("bytes", "bundled"), ("bytes", "random_128")]
    assert set(rows) == {(label, *task) for label in ("dense", "none", "int8") for task in tasks}
    int8, raw = rows["int8", "bytes", "bundled"], rows["none", "bytes", "bundled"]
    assert rows["dense", "bytes", "bundled"]["bytes_per_token"] == 1024 and int8["bytes_per_token"] < 0.8 * raw["bytes_per_token"]
    assert int8["ppl"] is None and int8["attention_impl"] == "pikv cpu int8" and rows["int8", "ppl", "bundled"]["kl"] > 1e-6
    assert document["command"] == "pikv sweep --only compression --quick" and [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    shown = capsys.readouterr().out
    assert "12/12, about 0 min left" in shown and "int8" in shown.partition("12/12")[2]


def test_a_sweep_goes_on_where_it_stopped(tmp_path, capsys):
    file, out = small(tmp_path), tmp_path / "rows.json"
    items = items_of(read_sweep(file), None, False, parse, {})
    stored = Partial(tmp_path / "rows.json.partial")
    for item in items:
        stored.add(key_of(item.spec, item.unit), row(None, item.label, item.unit.task, ppl=1.0))
    assert main(["sweep", str(file), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["detail"]["label"] for row in rows] == ["dense", "four bits", "raw"] and {row["ppl"] for row in rows} == {1.0}
    assert "3 units, 3 of them" in capsys.readouterr().out and not stored.path.exists(), "no worker was needed"


def test_workers_answer_refusals_and_their_end_is_told(tmp_path):
    spec, _ = read_spec(parse(["eval", "--context", "256", "--samples", "2", "--tasks", "bytes"]))
    answers = {}
    refused = {"storage": {"num_shards": 2}, "scheduling": {"method": "expected_attention", "budget_ratio": 0.5}}
    work = [(spec, Unit(task=task, block=block)) for task, block in (("bytes", refused), ("bytes", None), ("unheard", None))]
    with pytest.raises(RuntimeError, match="KeyError: 'unheard'"):
        measure_all(work, 1, tmp_path, answers.__setitem__)
    assert "with 2 shards" in answers[0]["refused"] and answers[1]["row"]["bytes_per_token"] == 2048


@pytest.mark.parametrize(
    ("family", "argument", "said"),
    [
        ({"entries": [{"label": "x", "pikv": {"page_sise": 1}}]}, [], "sweep entry own/x: unknown key pikv.page_sise"),
        ({"entries": [{"label": "x", "pikv": {}, "beside": "y"}]}, [], "no entry has the label 'y'; legal are dense, x"),
        ({"entries": [{"label": "x", "pikv": {}}] * 2}, [], "the label 'x' stands twice"),
        ({"runs": [{"options": SHORT, "tasks": ["speed"]}]}, [], "legal are ppl, recall, bytes"),
        ({}, ["--only", "other"], "--only 'other': the families of this sweep are own"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_measured(tmp_path, capsys, family, argument, said):
    assert main(["sweep", str(small(tmp_path, **family)), *argument]) == 2
    assert said in capsys.readouterr().err


def test_files_that_are_no_sweep(tmp_path):
    with pytest.raises(FileNotFoundError, match="or for `pikv sweep` one of launch/sweeps"):
        read_sweep(tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not a sweep of families"):
        read_sweep(tmp_path / "list.json")
