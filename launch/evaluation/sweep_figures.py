"""Figures of docs/results/methods.md: configurations of a sweep, quality against bytes and against entries read, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import check_matplotlib, scatter
from .sweep_table import records_of

FIGURES = {
    "methods_bytes.png": (("compression", "presets"), "bytes_per_token", "KV bytes per token"),
    "methods_kept.png": (("scheduling",), "bytes_per_token", "KV bytes per token"),
    "methods_entries.png": (("routing",), "entries_read", "share of entries read"),
}


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
