"""`pikv methods` and docs/results/methods.md: registries, results and verdicts; the document is what the command makes of them."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.config.presets import PRESETS
from pikv_ds.launch.cli import main
from pikv_ds.launch.commands import methods as cmd_methods
from pikv_ds.launch.commands._methods_doc import written
from pikv_ds.launch.commands._methods_table import HOLDS_ON, Results, attend_path, method_rows, registries
from pikv_ds.launch.commands.sweep import SWEEPS
from pikv_ds.launch.evaluation.spec import COLUMNS
from pikv_ds.launch.evaluation.sweep_figures import write_figures
from pikv_ds.launch.evaluation.sweep_table import records_of, shown

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "results"


def row(family, label, task="ppl", context=1024, model="bundled", **values):
    detail = {"family": family, "label": label, "model": model} | values.pop("detail", {})
    given = {"task": task, "context": context, "kv_bytes_per_rank": [8], "bytes_per_token": 8.0, "compression": 2.0, "ranks": 1}
    return dict.fromkeys(COLUMNS) | given | {"attention_impl": "pikv cpu int4", "backend": "hf"} | values | {"detail": detail}


@pytest.fixture
def folder(tmp_path):
    entries = [
        {"label": "4 bits", "pikv": {"compression": {"method": "int4"}}, "beside": "raw"},
        {"label": "4 bits, group 128", "pikv": {"compression": {"method": "int4", "group": 128}}, "beside": "4 bits"},
        {"label": "raw", "pikv": {"compression": {"method": "none"}}},
    ]
    sweep = {"families": {"compression": {"runs": [], "entries": entries}}}
    rows = [
        row(None, "dense"),
        row("compression", "4 bits", "ppl", 2048, ppl_change_pct=3.5, kl=0.2),
        row("compression", "4 bits", "ppl", 1024, ppl_change_pct=-0.001, kl=0.1),
        row("compression", "4 bits", "recall", 1024, recall=0.75, detail={"found_question_after_eviction": [4, 16]}),
        row("compression", "4 bits", "bytes", 4096, bytes_per_token=384.4, compression=2.67),
        row("compression", "4 bits", "bytes", 4096, model="random_128", compression=3.4),
        row("compression", "raw", "ppl", 1024, ppl_change_pct=0.0, kl=0.0, attention_impl="pikv torch fp32"),
    ]
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "methods.json").write_text(json.dumps(sweep))
    (tmp_path / "methods.json").write_text(json.dumps({"rows": rows}))
    verdicts = {"compression": {"int4": [True, "small", "both"], "none": [False, "large", "bundled"]}}
    (tmp_path / "sweeps" / "verdicts.json").write_text(json.dumps(verdicts))
    return tmp_path


def test_the_rows_of_a_configuration_become_one_record(folder):
    records = records_of(json.loads((folder / "methods.json").read_text())["rows"], "compression")
    four, raw = records["4 bits"], records["raw"]
    assert (four["ppl_change_pct"], four["kl"], four["ppl_change_long_pct"], four["long_context"]) == (-0.001, 0.1, 3.5, 2048)
    assert (four["recall"], four["recall_after"], four["bytes_per_token"], four["bytes_context"]) == (0.75, 0.25, 384.4, 4096)
    assert (four["compression"], four["compression_other"]) == (2.67, 3.4)
    assert (raw["ppl_change_long_pct"], raw["recall"], raw["recall_after"], raw["bytes_context"]) == (None, None, None, 1024)


def test_bytes_of_the_fullest_rank_are_compared_with_a_dense_rank():
    """Two ranks, the same 100 tokens on both, 1,024 bytes per token when dense; 40 bytes per token over both, unevenly."""
    sizes = {"kv_bytes_per_rank": [3000, 1000], "bytes_per_token": 40.0, "compression": 25.6, "detail": {"tokens_in_cache": 100}}
    (record,) = records_of([row("stack", "x", "bytes", 4096, ranks=2, **sizes)], "stack").values()
    assert record["rank_ratio"] == pytest.approx(100 * 1024 / 3000) and shown(record)["2-byte dense rank / fullest rank"] == "34.1"


def test_a_method_has_the_figures_of_its_first_configuration_its_control_and_its_verdict(folder):
    rows = {row["name"]: row for row in method_rows(Results(folder, folder / "sweeps")) if row["key"] == "compression.method"}
    int4 = rows["int4"]
    assert (int4["measured as"], int4["recall"], int4["attend path"]) == ("4 bits", 0.75, "compiled")
    assert int4["beside"] == "raw (ppl +0.00 %)" and (int4["worth using"], int4["because"]) == ("yes", "small")
    assert (rows["none"]["worth using"], rows["none"]["attend path"]) == ("no", "torch")
    assert rows["int8"]["measured as"] is None and rows["int8"]["worth using"] is None
    assert [attend_path(name) for name in ("pikv cuda bf16", "pikv torch int8", "pikv cpu torch")] == ["compiled", "torch", "torch"]


def test_tables_are_made_between_markers(folder):
    text = "a\n<!-- table compression -->\nstale\n<!-- end -->\nb\n<!-- verdicts compression -->\n<!-- end -->\n"
    made = written(text, Results(folder, folder / "sweeps"))
    assert (
        "stale" not in made
        and made.startswith("a\n<!-- table")
        and "\nb\n" in made
        and written(made, Results(folder, folder / "sweeps")) == made
    )
    assert "| 4 bits | 384 | 2.67 | 3.40 | +0.00 | +3.50 | 1.0e-01 | 0.75 | pikv cpu int4 | raw (ppl +0.00 %) |" in made
    assert "| `int4` | yes | both | +0.00 | - | 0.75 / 0.25 | - | small |" in made and "`int8`" not in made


def test_the_terminal_shows_results_or_says_that_there_are_none(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(cmd_methods, "RESULTS", folder)
    monkeypatch.setattr(cmd_methods, "SWEEPS", folder / "sweeps")
    assert main(["methods", "--json", str(folder / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "raw (ppl +0.00 %)" in shown and "no results" not in shown
    assert {row["name"]: row["recall"] for row in json.loads((folder / "out.json").read_text())["rows"]}["int4"] == 0.75
    monkeypatch.setattr(cmd_methods, "RESULTS", tmp_path / "absent")
    monkeypatch.setattr(cmd_methods, "SWEEPS", SWEEPS)
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert "not of the wheel" in shown and "streaming_llm" in shown and "worth using" in shown


def test_figures_are_drawn_of_what_was_measured(folder):
    rows = json.loads((folder / "methods.json").read_text())["rows"]
    assert [path.name for path in write_figures(folder, rows)] == ["methods_bytes.png"]
    assert (folder / "methods_bytes.png").read_bytes().startswith(b"\x89PNG") and write_figures(folder, rows[:1]) == []


@pytest.mark.parametrize(("name", "markers"), [("methods", 14), ("real", 6)])
def test_the_document_is_what_the_command_makes(name, markers):
    text = (FOLDER / f"{name}.md").read_text()
    assert text.count("<!-- end -->") == markers and written(text, Results(FOLDER, SWEEPS)) == text, (
        f"run pikv methods --doc docs/results/{name}.md"
    )


def judged() -> dict:
    """The registries of methods that are judged by their quality: where entries lie changes no output."""
    return {family: registry for family, registry in registries().items() if family not in ("pools", "storage")}


def test_verdicts_are_about_registered_methods():
    verdicts = json.loads((SWEEPS / "verdicts.json").read_text())
    for family, registry in judged().items():
        assert set(verdicts[family]) <= set(registry.names())
        assert all(isinstance(worth, bool) and reason and models in HOLDS_ON for worth, reason, models in verdicts[family].values())


def test_every_measured_method_is_judged():
    results = Results(FOLDER, SWEEPS)
    for family, registry in judged().items():
        measured = {results.method_of(family, label) for label in results.records[family]}
        assert measured <= set(results.verdicts[family]) and measured <= set(registry.names())


def test_a_verdict_holds_on_the_real_model_only_where_that_was_measured():
    results = Results(FOLDER, SWEEPS)
    for family, verdicts in results.verdicts.items():
        claimed = [name for name, (_, _, models) in verdicts.items() if models != "bundled" and name != "none"]  # it is exact everywhere
        assert [name for name in claimed if not results.real_of_method(family, name)] == [], family


# Table 1, table 2, table 3 and the README of the authors.
NAMES = (
    "R_B R_T R_LB R_P R_E R_A R_H Sinkhorn PE BA FlexMoE TimeMoE FastMoE FasterMoE SmartMoE "
    "C_Lo C_Lo+ C_Py C_Ch C_SVD C_F C_Dis C_Pr quantised unified "
    "S_H2O S_SL S_QUEST S_Flex S_LRU S_LRU+ S_AdaKV S_Duo Belady Hazard-LRU two-queue "
    "XOR FPGA DistillM DistillM-2 TTFT TBT ZeRO vLLM kvpress ablation A B C D E F G"
).split()


def names_of_the_paper() -> list[list[str]]:
    """[name, served or not, configuration, note] of each row of that section."""
    text = (ROOT / "docs" / "reference" / "paper.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0] != "name"]


def test_every_name_of_the_paper_is_served_or_the_reason_is_given():
    rows = names_of_the_paper()
    named = {word for row in rows for word in re.split(r"[\s,()]+", row[0])}
    assert not set(NAMES) - named, f"docs/reference/paper.md does not say where {sorted(set(NAMES) - named)} are"
    for name, state, configuration, note in rows:
        assert state in ("served", "by another name", "left out"), name
        assert (configuration or note) if state != "left out" else (note and not configuration), name
    assert [sum(row[0].startswith(kind) for row in rows) for kind in ("R_", "C_", "S_")] == [7, 8, 8]


def test_names_of_the_configuration_beside_those_of_the_paper_exist():
    checked = 0
    for row in names_of_the_paper():
        assert not row[2] or re.fullmatch(r"`[\w.]+: \w+`", row[2]), row
        for key, value in re.findall(r"`([\w.]+): (\w+)`", " ".join(row[2:])):
            block, _, field = key.rpartition(".")
            if key == "preset":
                assert value in PRESETS, row
            elif field in ("method", "placement"):
                assert value in registries()[block].names(), row
            else:
                assert value in get_args(type(getattr(PiKVConfig(), block)).model_fields[field].annotation), row
            checked += 1
    assert checked > 45
