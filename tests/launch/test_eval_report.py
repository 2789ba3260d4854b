"""Sweeps and the report: one row per configuration and task, figures that hold what the rows say."""

import json
import random

import pytest

from pikv_ds.launch.cli import main
from pikv_ds.launch.evaluation.report import labels, pareto, write_report

SMALL = ["--context", "160", "--samples", "2"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.json").write_text(json.dumps([{"page_size": 8}, {"pikv": {"page_size": 128}}, {}]))
    command = [
        "eval",
        *SMALL,
        "--sweep",
        str(folder / "sweep.json"),
        "--report",
        str(folder / "report"),
        "--json",
        str(folder / "rows.json"),
    ]
    assert main(command) == 0
    return folder


def test_a_sweep_measures_dense_once_and_each_configuration(swept):
    rows = json.loads((swept / "rows.json").read_text())["rows"]
    assert [(row["method"], row["config"], row["task"]) for row in rows] == [
        (*named, task)
        for named in (("dense", None), ("exact", {"page_size": 8}), ("exact", {"page_size": 128}), ("exact", {}))
        for task in ("ppl", "recall")
    ]
    small_pages, large_pages = (
        row["bytes_per_token"] for row in rows if row["task"] == "ppl" and row["config"] and row["config"]["page_size"]
    )
    assert small_pages < large_pages  # 160 tokens leave most of a second page of 128 empty


def test_the_report_has_its_figures_and_every_row(swept):
    page = (swept / "report" / "report.html").read_text()
    for file in ("quality_bytes.png", "quality_entries.png", "recall_depth.png", "load_ranks.png"):
        data = (swept / "report" / file).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5_000 and f'src="{file}"' in page
    assert page.count("<tr>") == 1 + 8 and "pikv eval --backend hf" in page and "exact page_size=128" in page


def test_a_report_needs_no_run(swept, tmp_path):
    document = json.loads((swept / "rows.json").read_text())
    for row in document["rows"]:
        row["entries_read"], row["method"] = None, "<b>" + row["method"]
    page = write_report(tmp_path, [document]).read_text()
    assert "No row has these figures." in page and not (tmp_path / "quality_entries.png").exists()
    assert "<b>" not in page and "&lt;b&gt;exact" in page


def test_labels_tell_configurations_apart():
    row = {"backend": "hf", "ranks": 1, "method": "int8", "config": {"compression": {"method": "int8", "group": 32}, "page_size": 8}}
    other = {**row, "backend": "megatron", "ranks": 2, "config": None, "method": "dense"}
    assert labels([row]) == ["int8 page_size=8 compression.group=32"]
    assert labels([row, other]) == ["hf x1 int8 page_size=8 compression.group=32", "megatron x2 dense"]


def beats(points, j: int, i: int) -> bool:
    """j is no worse in both, and better or, of equals, first."""
    return points[j][0] <= points[i][0] and points[j][1] <= points[i][1] and (points[j] != points[i] or j < i)


def test_the_front_is_what_no_point_beats():
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randrange(8), rng.randrange(8)) for _ in range(12)]
        left = [i for i, point in enumerate(points) if not any(beats(points, j, i) for j in range(len(points)) if j != i)]
        assert pareto(points) == sorted(left, key=lambda i: points[i])


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "holds no configuration"),
        ('{"page_size": 8}', "legal is a JSON list"),
        ('[{}, {"page_sise": 8}]', "entry 1"),
        ("[{}", "is not JSON"),
    ],
)
def test_a_wrong_sweep_is_told_before_anything_is_measured(tmp_path, content, message, capsys):
    file = tmp_path / "sweep.json"
    file.write_text(content)
    assert main(["eval", "--sweep", str(file)]) == 2
    assert message in capsys.readouterr().err
