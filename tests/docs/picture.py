"""docs/figures/readme.svg, the picture of the README, from committed results.

Left: KV bytes per rank, docs/results/demo.json. Right: time of a decode step by format, docs/results/bench_ops.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
WIDTH, ROW, LEFT, BAR = 460, 34, 150, 210  # pixels: of a panel, of a bar and its space, of the labels, of the longest bar
TOKENS = 32768
DENSE, OURS = "#8a8f98", "#2f6fde"
FORMATS = ("bf16", "int8", "int4", "int8/int4")
Bars = Sequence[tuple[str, float, str, str]]  # label, length, text at its end, colour


def _rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def bytes_per_rank() -> Bars:
    """What each rank allocates: dense and PiKV with the same requests, then with each rank its own."""
    bars = []
    for row in _rows("demo"):
        kind = "PiKV" if row["name"].startswith("pikv") else "dense"
        for rank, size in enumerate(row["kv_bytes_per_rank"]):
            bars.append((f"{kind}, rank {rank}", size / 1024, f"{size / 1024:,.0f} KiB", OURS if kind == "PiKV" else DENSE))
    return bars


def decode_times() -> Bars:
    """One request of TOKENS tokens, one thread, pages in order."""
    rows = {
        row["format"]: row
        for row in _rows("bench_ops")
        if (row["batch"], row["context"], row["threads"], row["pages"], row["baseline"]) == (1, TOKENS, 1, "contiguous", "sdpa_grouped")
    }
    dense = rows["bf16"]["baseline_ms"]
    ours = [
        (f"PiKV {name}", rows[name]["ms"], f"{rows[name]['ms']:.1f} ms, {rows[name]['bytes'] / 2**20:,.0f} MiB", OURS) for name in FORMATS
    ]
    return [(rows["bf16"]["baseline_ran"].replace("sdpa_grouped", "torch SDPA,"), dense, f"{dense:.1f} ms", DENSE), *ours]


def panel(x: int, title: str, groups: Sequence[tuple[str, Bars]]) -> tuple[list[str], int]:
    """Horizontal bars on one scale; returns the elements and the height they take."""
    longest = max(length for _, bars in groups for _, length, _, _ in bars)
    parts, y = [f'<text x="{x}" y="26" font-size="15" font-weight="bold">{title}</text>'], 46
    for subtitle, bars in groups:
        parts.append(f'<text x="{x}" y="{y + 10}" font-size="12" fill="#555">{subtitle}</text>')
        y += 20
        for label, length, text, colour in bars:
            long = BAR * length / longest
            parts.append(f'<text x="{x + LEFT - 8}" y="{y + 16}" font-size="12" text-anchor="end">{label}</text>')
            parts.append(f'<rect x="{x + LEFT}" y="{y + 2}" width="{long:.1f}" height="20" fill="{colour}"/>')
            parts.append(f'<text x="{x + LEFT + long + 6:.1f}" y="{y + 16}" font-size="12">{text}</text>')
            y += ROW - 6
        y += 8
    return parts, y


def written() -> str:
    sizes = bytes_per_rank()
    left, high = panel(
        20,
        "KV cache per rank, 2 ranks",
        [("both ranks run the same 1,100 tokens", sizes[:4]), ("1,100 tokens on rank 0, 137 on rank 1", sizes[4:])],
    )
    right, low = panel(
        40 + WIDTH, "Attention of a decode step, 1 thread", [(f"{TOKENS:,} tokens, 32 query and 8 KV heads of 128", decode_times())]
    )
    height, width = max(high, low) + 6, 2 * WIDTH + 60
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" fill="#111">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *left, *right, "</svg>"]) + "\n"
