"""docs/guide/measuring.md, docs/results/evaluation.md: commands parse, the first one runs, columns are the rows', tables the results'."""

import json
import re
import shlex
from pathlib import Path

import pytest

from pikv_ds.launch.cli import build_parser, main
from pikv_ds.launch.evaluation.plan import read_spec
from pikv_ds.launch.evaluation.spec import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
# What a sweep runs lay beside its rows when these runs were made; their commands are kept as they were.
MOVED = re.compile(r"docs/results/(\w+)_sweep(\w*)\.json")
TEXT = (ROOT / "docs" / "guide" / "measuring.md").read_text()
RESULTS = (ROOT / "docs" / "results" / "evaluation.md").read_text()


def test_the_first_command_runs(tmp_path, monkeypatch):
    command = re.search(r"```\npikv (.*?)\n```", TEXT).group(1)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    assert (tmp_path / "report" / "report.html").is_file() and len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


def test_options_exist():
    commands = build_parser()._subparsers._group_actions[0].choices
    usage = commands["eval"].format_help() + commands["baseline"].format_help()
    listed = set(re.findall(r"`(--[a-z]+)", TEXT.partition("## lm-eval")[0]))
    assert len(listed) > 10 and [option for option in listed if option not in usage and option != "--out"] == []


def test_every_column_is_explained():
    table = TEXT.partition("## Columns")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))) == set(COLUMNS)


def results(name: str) -> dict:
    """Rows of a committed run, by method and task."""
    return {(row["method"], row["task"]): row for row in json.loads((ROOT / f"docs/results/{name}.json").read_text())["rows"]}


def shown(*backends: str) -> list[list[str]]:
    lines = [line for line in RESULTS.splitlines() if line.startswith(tuple(f"| {backend}" for backend in backends))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def of_dense(row: dict) -> float:
    return max(row["kv_bytes_per_rank"]) / max(row["detail"]["kv_bytes_dense_per_rank"])


def small(number: float) -> str:
    return "0" if number == 0 else "< 1e-8" if abs(number) < 1e-8 else f"{number:.1e}"


def test_the_table_of_two_ranks_is_that_of_the_committed_results():
    found = []
    for name, backend in (("eval_hf", "hf, AutoEP 2"), ("eval_megatron", "megatron, EP 2")):
        rows = results(name)
        for method in ("dense", "exact"):
            ppl, share = rows[method, "ppl"], f"{of_dense(rows[method, 'ppl']):.3f}".rstrip("0").rstrip(".")
            found.append([backend, method, f"{ppl['ppl']:.5f}", small(ppl["kl"]), f"{rows[method, 'recall']['recall']:.2f}"])
            found[-1] += [f"{max(ppl['kv_bytes_per_rank']):,}", share, ppl["attention_impl"]]
    assert found == shown("hf,", "megatron,")


def test_the_table_of_compressed_pages_is_that_of_the_committed_results():
    found = []
    for backend in ("hf", "megatron"):
        rows = results(f"eval_{backend}_codecs")
        for method in ("exact", "int8", "int4"):
            ppl = rows[method, "ppl"]
            found.append([backend, method, f"{ppl['ppl']:.3f}", f"{round(ppl['ppl_change_pct'], 2) + 0.0:.2f} %", small(ppl["kl"])])
            found[-1] += [f"{rows[method, 'recall']['recall']:.2f}", f"{ppl['bytes_per_token']:,.0f}", f"{ppl['compression']:.2f}"]
            found[-1].append(ppl["attention_impl"])
    assert found == shown("hf |", "megatron |")


def test_the_table_beside_transformers_is_that_of_the_committed_results():
    found, rows = [], results("baseline_quantized")
    for method, task in rows:
        if task == "ppl":
            ppl, recall = rows[method, "ppl"], rows[method, "recall"]["recall"]
            name = {"dense": "dense bf16"}.get(method, method if "Quantized" in method else f"pikv {method}").replace(" axis", ", axis")
            found.append([name, f"{ppl['ppl_change_pct']:+.2f} %", small(ppl["kl"]), f"{recall:.2f}", f"{ppl['bytes_per_token']:,.0f}"])
            times = ppl["detail"]
            found[-1] += [f"{ppl['compression']:.2f}", f"{times['prompt_cpu_ms']:,.0f}", f"{times['step_cpu_ms_mean']:.1f}"]
    found[0][1] = f"{rows['dense', 'ppl']['ppl']:.3f}"
    assert found == shown("dense bf16", "QuantizedCache", "pikv ")


@pytest.fixture(scope="module")
def svd_changes():
    """Change of perplexity with svd in %, by context, seed, what else the configuration says, and how the basis was fitted."""
    found = {}
    for row in json.loads((ROOT / "docs/results/svd_fit_once.json").read_text())["rows"]:
        block = dict((row["config"] or {}).get("compression", {}))
        if block.get("method") == "svd":
            fitted = block.pop("fit_tokens", None), block.pop("refit", True)
            beside = "raw window" if "raw_recent_tokens" in block else (row["config"].get("routing") or {}).get("method")
            found.setdefault((row["context"], row["seed"], block["rank"], beside), {})[fitted] = row["ppl_change_pct"]
    return found


FITTED = [(1, True), *((tokens, False) for tokens in (128, 256, 512, 1024))]  # at the first forward, then once after so many tokens


def test_the_table_of_bases_that_are_fitted_once_is_that_of_the_committed_results(svd_changes):
    table = (ROOT / "docs" / "results" / "compression.md").read_text().partition("| tokens | rank | re-fitted |")[2].partition("\n\n")[0]
    found = []
    for (context, seed, rank, beside), changes in svd_changes.items():
        if seed == 0:
            cells = [f"{changes[way]:+.2f}" if way in changes else "-" for way in [(None, True), *FITTED]]
            name = {None: "", "raw window": ", raw window"}.get(beside, f", `{beside}`")
            found.append(f"| {context:,} | {rank}{name} | {' | '.join(cells)} |")
    assert sorted(found) == sorted(table.splitlines()[2:])


def test_the_ranges_of_bases_that_are_fitted_once_are_those_of_the_committed_results(svd_changes):
    table = (ROOT / "docs" / "results" / "compression.md").read_text().partition("| fitted after |")[2].partition("\n\n")[0]
    found = []
    for way in FITTED:
        cells = []
        for tokens in (1024, 2048):
            ratios = [x[way] / x[None, True] for (context, *_), x in svd_changes.items() if context == tokens and way in x]
            cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-")
        found.append(f"| {'the first 32' if way[0] == 1 else format(way[0], ',')} | {' | '.join(cells)} |")
    assert found == table.splitlines()[2:]


def test_both_backends_reach_the_same_quality_in_fewer_bytes():
    """The same command on both, two ranks with the same requests."""
    hf, megatron = results("eval_hf"), results("eval_megatron")
    for rows in (hf, megatron):
        assert rows["exact", "recall"]["recall"] >= 0.95 and {row["ranks"] for row in rows.values()} == {2}
        assert all(of_dense(rows["exact", task]) <= 0.72 and rows["exact", task]["attention_impl"] for task in ("ppl", "recall"))
    assert abs(hf["exact", "recall"]["recall"] - megatron["exact", "recall"]["recall"]) <= 0.01
    assert megatron["exact", "ppl"]["ppl"] == pytest.approx(hf["exact", "ppl"]["ppl"], rel=1e-3)


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "results").glob("eval_*.json")), ids=lambda file: file.stem)
def test_committed_results_say_how_they_were_made(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    document = json.loads(file.read_text())
    arguments = shlex.split(MOVED.sub(r"launch/sweeps/\1\2.json", document["command"]))
    assert arguments[0] == "pikv" and document["versions"]["torch"] and document["machine"]["cpu"]
    spec, units = read_spec(build_parser().parse_args(arguments[1:]))
    assert len(units) == len(document["rows"])
    for row, unit in zip(document["rows"], units, strict=True):
        assert [*row] == [*COLUMNS, "detail"] and row["task"] == unit.task and row["chunk"] == spec.chunk
        assert (row["backend"], row["ranks"], row["tp"], row["ep"]) == (spec.backend, spec.ranks, spec.tp, spec.ep)
