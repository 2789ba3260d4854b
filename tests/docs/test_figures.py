"""Figures in the README and in docs/results that have no test beside their command are those of the committed rows."""

import json
import re
from pathlib import Path

import pytest

from .generated import ROOT

RESULTS = ROOT / "docs" / "results"


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def lines(file: Path, after: str) -> list[list[str]]:
    """The cells of the first table behind these words, without its head."""
    table = file.read_text(encoding="utf-8").partition(after)[2].partition("\n|")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_demo():
    found = []
    for row in rows("demo"):
        contexts, sizes = (
            " / ".join(map(str, row["context_tokens"])),
            " / ".join(f"{size / 1024:,.0f}" for size in row["kv_bytes_per_rank"]),
        )
        same = "same" if row["tokens_equal"] else "other"
        found.append([row["name"], contexts, sizes, same, f"{row['max_logit_diff']:.0e}", f"{row['tokens_per_s']:.0f}"])
    assert found == lines(RESULTS / "speed.md", "## The demo")


@pytest.mark.parametrize("column, suffix", [(2, ""), (3, "_intel")])
def test_a_decode_step(column, suffix):
    measured = [row for name in ("bundled", "wide") for row in rows(f"bench_decode_{name}{suffix}") if row["name"] == "pikv exact"]
    assert [(f"{row['context_tokens']:,}", f"{row['ratio']:.2f}") for row in measured] == [
        (line[1], line[column]) for line in lines(RESULTS / "speed.md", "## A decode step")
    ]


def test_the_penalty_under_megatron():
    found = []
    for row in rows("eval_penalty_megatron"):
        if row["method"] != "dense":
            change, fullest = row["ppl_change_pct"], row["detail"]["fullest_shard_over_mean"]
            found.append(("0" if abs(change) < 0.005 else f"{change:+.2f} %", f"{fullest:.2f}"))
    assert [(line[2], line[3]) for line in lines(RESULTS / "penalty.md", "## Under Megatron-Core")] == found


@pytest.mark.parametrize("preset", ["accurate", "balanced", "small"])
def test_presets_in_the_readme(preset):
    (line,) = re.findall(rf'^\| ([\d.]+) x fewer bytes \| `{{"preset": "{preset}"}}` \| (.*) \|$', (ROOT / "README.md").read_text(), re.M)
    of = {row["task"]: row for row in rows("methods") if (row["detail"].get("family"), row["detail"].get("label")) == ("presets", preset)}
    ratio, said = float(line[0]), re.match(r"([\d.]+) % perplexity", line[1])
    assert ratio == round(of["bytes"]["compression"], len(line[0].partition(".")[2]))
    change = of["ppl"]["ppl_change_pct"]
    assert abs(change) < 0.05 if said is None else float(said[1]) == round(change, len(said[1].partition(".")[2]))
    assert of["recall"]["recall"] == 1.0
