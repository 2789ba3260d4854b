"""docs/EVALUATION.md: its commands parse, the first one runs, its columns are the rows', its table is the committed results'."""

import json
import re
import shlex
from pathlib import Path

from pikv_ds.launch.cli import build_parser, main
from pikv_ds.launch.evaluation.spec import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "EVALUATION.md").read_text()


def test_the_first_command_runs(tmp_path, monkeypatch):
    command = re.search(r"```\npikv (.*?)\n```", TEXT).group(1)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    assert (tmp_path / "report" / "report.html").is_file() and len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


def test_options_exist():
    usage = build_parser()._subparsers._group_actions[0].choices["eval"].format_help()
    listed = set(re.findall(r"`(--[a-z]+)", TEXT.partition("## lm-eval")[0]))
    assert len(listed) > 10 and [option for option in listed if option not in usage and option != "--out"] == []


def test_every_column_is_explained():
    table = TEXT.partition("## Columns")[2].partition("## Results")[0]
    assert set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))) == set(COLUMNS)


def test_the_table_is_that_of_the_committed_results():
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith(("| hf,", "| megatron,"))
    ]
    rows = [row for name in ("eval_hf", "eval_megatron") for row in json.loads((ROOT / f"docs/results/{name}.json").read_text())["rows"]]
    assert len(shown) == 4
    for backend, method, ppl, kl, recall, fullest, of_dense, attention in shown:
        own = {row["task"]: row for row in rows if row["backend"] == backend.partition(",")[0] and row["method"] == method}
        assert f"{own['ppl']['ppl']:.5f}" == ppl and f"{own['recall']['recall']:.2f}" == recall
        assert abs(own["ppl"]["kl"]) < (1e-8 if kl == "< 1e-8" else 1e-300)
        assert f"{max(own['ppl']['kv_bytes_per_rank']):,}" == fullest and attention == own["ppl"]["attention_impl"]
        share = max(own["ppl"]["kv_bytes_per_rank"]) / max(own["ppl"]["detail"]["kv_bytes_dense_per_rank"])
        assert f"{share:.3f}".rstrip("0").rstrip(".") == of_dense
