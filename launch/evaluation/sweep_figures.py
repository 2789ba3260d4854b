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
    (("compression", "scheduling", "presets"), "compression", "KV bytes / those of a 2-byte cache"),
    (("routing",), "entries_read", "share of entries read"),
)
LEAST_SHOWN = 0.01  # %, on a logarithmic axis
_BUNDLED, _REAL = {"mfc": "none", "mec": "tab:orange"}, {"color": "tab:blue"}


def write_real_figure(folder: Path, pairs: Sequence[tuple[str, str, dict[str, Any], dict[str, Any] | None]]) -> Path | None:
    """real.png: perplexity of both models against bytes and against entries read, with the real one's Pareto fronts; None: no rows.

    pairs: family, label, record of the real model, record of the bundled one or None.
    """
    if not pairs:
        return None
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    for axis, (families, cost, title) in zip(figure.subplots(1, 2), REAL, strict=True):
        front = []
        for family, label, real, bundled in pairs:
            if family not in families:
                continue
            for record, look in ((bundled, _BUNDLED), (real, _REAL)):
                place = None if record is None else _place(record, cost)
                if place is None:
                    continue
                axis.plot(*place, "o", markersize=5, **look)
                if record is real:
                    axis.annotate(label, place, fontsize=5, xytext=(3, 3), textcoords="offset points")
                    front.append(place)
        best = [front[idx] for idx in pareto(front)]
        axis.step([x for x, _ in best], [y for _, y in best], where="post", color="0.6", linewidth=1)
        axis.set(xlabel=title, ylabel=f"perplexity change, % (less than {LEAST_SHOWN} as {LEAST_SHOWN})", yscale="log")
        axis.grid(alpha=0.3)
        axis.plot([], [], "o", **_REAL, label="real model, and its Pareto front")
        axis.plot([], [], "o", **_BUNDLED, label="bundled model")
        axis.legend(fontsize=7, loc="upper right")
    file = folder / "real.png"
    figure.savefig(file, dpi=110)
    return file


def _place(record: dict[str, Any], cost: str) -> tuple[float, float] | None:
    """Models have caches of other sizes, so bytes are a share of the ordinary one's."""
    if record[cost] is None or record["ppl_change_pct"] is None:
        return None
    return 1 / record[cost] if cost == "compression" else record[cost], max(record["ppl_change_pct"], LEAST_SHOWN)


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
