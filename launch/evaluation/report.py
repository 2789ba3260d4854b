"""A page with figures from the rows of `pikv eval`: quality against bytes and against entries read, recall by depth, load per rank.

python -m pikv_ds.launch.evaluation.report ROWS.json [ROWS.json ...] --out FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pikv_ds.errors import ConfigError
from pikv_ds.launch.evaluation.spec import COLUMNS

QUALITIES = (("ppl_change_pct", "perplexity change, %"), ("kl", "KL from the dense cache, nats"), ("recall", "recall"))
LEAST_SPAN = {"ppl_change_pct": 0.01, "kl": 1e-4, "recall": 1.1}


def write_report(folder: str | Path, documents: Sequence[dict[str, Any]]) -> Path:
    """Write report.html and its PNG figures to `folder`; returns the page. documents: what `--json` wrote, one or several runs."""
    check_matplotlib()
    import matplotlib

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for document in documents for row in document["rows"]]
    names = labels(rows)
    drawn = []
    with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}):
        for file, title, draw in _FIGURES:
            figure = draw(rows, names)
            if figure is None:
                drawn.append((None, title))
                continue
            figure.savefig(folder / file, dpi=120, bbox_inches="tight")
            drawn.append((file, title))
    page = folder / "report.html"
    page.write_text(_page(documents, rows, names, drawn), encoding="utf-8")
    return page


def labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A name per row that tells configurations apart: what a sweep calls it; or backend and ranks where they differ, the method, and what
    else the block sets."""
    if all("label" in row.get("detail", ()) for row in rows):
        return [": ".join(filter(None, (row["detail"]["family"], row["detail"]["label"]))) for row in rows]
    several = len({(row["backend"], row["ranks"]) for row in rows}) > 1
    return [(f"{row['backend']} x{row['ranks']} " if several else "") + row["method"] + _options(row["config"] or {}) for row in rows]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points (cost, loss) that no other point beats or equals in both, by ascending cost."""
    front: list[int] = []
    for idx in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[idx][1] < points[front[-1]][1]:
            front.append(idx)
    return front


def _options(block: dict[str, Any]) -> str:
    left = {key: value for key, value in block.items() if not isinstance(value, dict)}
    for key, value in block.items():
        if isinstance(value, dict):
            left |= {f"{key}.{name}": option for name, option in value.items() if name != "method"}
    return "".join(f" {key}={json.dumps(value, separators=(',', ':'))}" for key, value in left.items())


def scatter(cost: str, cost_title: str) -> Callable:
    """A function of rows and their names that draws each quality against a cost, with the Pareto front; None when no row has both."""

    def draw(rows: list[dict], names: list[str]) -> Any:
        from matplotlib.figure import Figure

        panels = [(key, title) for key, title in QUALITIES if any(row[key] is not None and row[cost] is not None for row in rows)]
        if not panels:
            return None
        height = max(4, 0.13 * len(set(names)))  # of the legend
        figure = Figure(figsize=(4.5 * len(panels), height), layout="constrained")
        colours = {name: f"C{idx % 10}" for idx, name in enumerate(dict.fromkeys(names))}
        drawn = {}
        for axis, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = [(row, name) for row, name in zip(rows, names, strict=True) if row[key] is not None and row[cost] is not None]
            sign = -1 if key == "recall" else 1
            front = pareto([(row[cost], sign * row[key]) for row, _ in shown])
            axis.step([shown[i][0][cost] for i in front], [shown[i][0][key] for i in front], where="post", color="0.6", linewidth=1)
            for row, name in shown:
                (drawn[name],) = axis.plot(row[cost], row[key], _marker(row, name), color=colours[name], markersize=7, linestyle="")
            low, high = (0.0, 1.0) if key == "recall" else axis.get_ylim()
            spare = max(LEAST_SPAN[key] - (high - low), 0) / 2  # rounding must not look like a difference
            axis.set_ylim(low - spare, high + spare)
            axis.set(xlabel=cost_title, ylabel=title)
        figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=7)
        return figure

    return draw


def _marker(row: dict[str, Any], name: str) -> str:
    """The dense cache is a star; others differ by shape as well as by colour."""
    return "*" if row["method"] == "dense" else "osD^vP"[sum(map(ord, name)) % 6]


def _by_depth(rows: list[dict], names: list[str]) -> Any:
    from matplotlib.figure import Figure

    shown = [(row["detail"]["found_by_depth"], name) for row, name in zip(rows, names, strict=True) if row["task"] == "recall"]
    if not shown:
        return None
    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for bins, name in shown:
        middles = [(idx + 0.5) / len(bins) for idx in range(len(bins))]
        asked = [(middle, found / count) for middle, (found, count) in zip(middles, bins, strict=True) if count]
        axis.plot(*zip(*asked, strict=True), marker="o", label=name)
    axis.set(xlabel="depth of the fact in the prompt", ylabel="recall", ylim=(-0.05, 1.05))
    axis.legend(fontsize=6)
    return figure


def _load(rows: list[dict], names: list[str]) -> Any:
    from matplotlib.figure import Figure

    task = rows[0]["task"]
    shown = [(row["kv_bytes_per_rank"], name) for row, name in zip(rows, names, strict=True) if row["task"] == task]
    figure = Figure(figsize=(6, 1 + 0.4 * sum(len(per_rank) for per_rank, _ in shown)))
    axis = figure.subplots()
    bars = [(f"{name}, rank {rank}", count / 2**20) for per_rank, name in shown for rank, count in enumerate(per_rank)]
    axis.barh([name for name, _ in bars], [size for _, size in bars], color="tab:blue")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=6)
    axis.set(xlabel=f"allocated KV of the rank, MiB (task {task})")
    return figure


_FIGURES = (
    (
        "quality_bytes.png",
        "Quality against bytes per token; the line is the Pareto front",
        scatter("bytes_per_token", "KV bytes per token"),
    ),
    ("quality_entries.png", "Quality against the share of entries read", scatter("entries_read", "share of entries read")),
    ("recall_depth.png", "Recall by depth", _by_depth),
    ("load_ranks.png", "Load per rank", _load),
)


_STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse;font-size:12px}td,th{border:1px solid #ccc;padding:2px 6px}"
    "img{max-width:100%}"
)


def _page(documents: Sequence[dict], rows: list[dict], names: list[str], drawn: list[tuple[str | None, str]]) -> str:
    shown = [key for key in COLUMNS if key not in ("config", "method", "attention_impl")] + ["attention_impl"]
    head = "".join(f"<th>{key}</th>" for key in ["configuration", *shown])
    body = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{escape(_cell(row[key]))}</td>" for key in shown) + "</tr>"
        for row, name in zip(rows, names, strict=True)
    )
    figures = "".join(
        f"<h2>{escape(title)}</h2>" + (f'<img src="{file}" alt="{escape(title)}">' if file else "<p>No row has these figures.</p>")
        for file, title in drawn
    )
    made = "".join(
        f"<pre>{escape(document['command'])}\n{escape(json.dumps(document['versions']))}\n{escape(json.dumps(document['machine']))}</pre>"
        for document in documents
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>pikv eval</title><style>{_STYLE}</style><h1>pikv eval</h1>{made}'
        f"<table><tr>{head}</tr>{body}</table>{figures}</html>\n"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_matplotlib() -> None:
    """Raises ConfigError when figures can't be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--report draws with matplotlib, which is not installed; pip install matplotlib, or leave --report out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", metavar="ROWS.json", help="what `pikv eval --json` wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    args = parser.parse_args()
    print(write_report(args.out, [json.loads(Path(name).read_text(encoding="utf-8")) for name in args.rows]))


if __name__ == "__main__":
    main()
