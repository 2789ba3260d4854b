"""Figures of `pikv plan --simulate`: bytes of the fullest rank, bytes sent and the least time of a step, against ranks."""

from __future__ import annotations

from typing import Any

PANELS = (
    ("kv_bytes_fullest", "KV of the fullest rank, GiB", 1 << 30),
    ("wire_bytes", "sent per rank and step, MiB", 1 << 20),
    ("step_ms", "least time of a step, ms", 1),
)  # fmt: skip


def draw(path: str, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4))
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    for axis, (key, title, unit) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for strategy in strategies:
            own = [row for row in rows if row["strategy"] == strategy]
            axis.plot([row["ranks"] for row in own], [row[key] / unit for row in own], marker="o", markersize=3, label=strategy)
        axis.set_xscale("log", base=2)
        if key == "wire_bytes":  # some strategies send nothing
            axis.set_yscale("symlog", linthresh=0.1)
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.set(title=title, xlabel="ranks")
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(f"{rows[0]['requests']} requests of {rows[0]['context']} tokens, {rows[0]['trace']} routing, {rows[0]['interconnect']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
