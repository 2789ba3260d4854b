"""Figures of docs/results/methods.md: configurations of a sweep, quality against bytes and against entries read, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import check_matplotlib, pareto, scatter
from .sweep_table import records_of

FIGURES = {
    "methods_bytes.png": (("compression", "presets"), "bytes_per_token", "KV bytes per token"),
    "methods_kept.png": (("scheduling",), "bytes_per_token", "KV bytes per token"),
    "methods_entries.png": (("routing",), "entries_read", "share of entries read"),
}


REAL = (
    (("compression", "scheduling", "together"), "bytes_per_token", "KV bytes per token"),
    (("routing",), "entries_read", "share of entries read"),
)


def write_real_figure(folder: Path, rows: Sequence[dict[str, Any]]) -> Path | None:
    """real.png: perplexity of the real model against bytes and against entries read, with the Pareto fronts; None: no rows."""
    if not rows:
        return None
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    for axis, (families, cost, title) in zip(figure.subplots(1, 2), REAL, strict=True):
        points = [record | {"method": name} for family in families for name, record in records_of(rows, family).items()]
        points = [point for point in points if point[cost] is not None and point["ppl_change_pct"] is not None]
        places = [(point[cost], max(point["ppl_change_pct"], 0.01)) for point in points]
        for place, point in zip(places, points, strict=True):
            axis.plot(*place, "o", markersize=5, color="tab:blue")
            axis.annotate(point["method"], place, fontsize=6, xytext=(3, 3), textcoords="offset points")
        front = [places[idx] for idx in pareto(places)]
        axis.step([x for x, _ in front], [y for _, y in front], where="post", color="0.6", linewidth=1)
        axis.set(xlabel=title, ylabel="perplexity change, % (less than 0.01 as 0.01)", yscale="log")
        axis.grid(alpha=0.3)
    file = folder / "real.png"
    figure.savefig(file, dpi=110)
    return file


def write_figures(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write those of FIGURES that the rows have points for."""
    check_matplotlib()
    import matplotlib

    written = []
    with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}):
        for file, (families, cost, title) in FIGURES.items():
            points = [record | {"method": name} for family in families for name, record in records_of(rows, family).items()]
            figure = scatter(cost, title)(points, [point["method"] for point in points]) if points else None
            if figure is not None:
                figure.savefig(folder / file, dpi=110, bbox_inches="tight")
                written.append(folder / file)
    return written
