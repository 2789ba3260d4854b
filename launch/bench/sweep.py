"""`pikv bench ops --sweep`: the ops over formats, groups, batches, contexts and page sizes, replayed as CUDA graphs; a row at a time.

Order: what decides the next piece of work comes first, so that a budget cuts off the rest. A row that fails says why and the next runs; the
file is written after every row. Pages are in random order, L2 is overwritten before each call. Columns:

    ms, graph_ms       one call from the host, and replayed from a graph (of a CPU: the same)
    gbps               bytes that the call must read and write, over graph_ms
    of_copy, of_read   gbps over the copy rate (read plus written) and over the rate of `checksum`, of the same run
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.ops.build import load

from . import sweep_cases as cases
from . import sweep_others
from .clock import Clock

REPEATS = 15


class Row(NamedTuple):
    """What is timed: `make(device)` gives the call and the bytes that it moves."""

    facts: dict[str, Any]
    make: Callable[[str], tuple[Callable[[], Any], int]]


def run(args: argparse.Namespace) -> int:
    """0, or 1 when a row failed."""
    rows = sweep(args.device, quick=args.quick, budget_s=args.budget, file=args.json)
    shown = [row for row in rows if row["op"] == "decode" or row["error"]]
    names = ("op", "format", "group", "batch", "context_tokens", "page_size", "options", "ms", "graph_ms", "gbps", "of_copy", "error")
    print_table(f"Sweep, {rows[0]['implementation']}", [{name: cell(row[name]) for name in names} for row in shown or rows])
    print(summary(rows))
    return 1 if any(row["error"] for row in rows) else 0


def sweep(device: str, *, quick: bool = False, budget_s: float | None = None, file: str | None = None) -> list[dict[str, Any]]:
    """Every row that the budget leaves time for, the two rates first."""
    started, clock, rows = time.monotonic(), Clock(device), []
    common = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "implementation": load.ensured(device)}
    repeats, rates = 3 if quick else REPEATS, {}
    for row in planned(quick):
        if rows and budget_s is not None and time.monotonic() - started > budget_s:
            break
        found = {**cases.BLANK, **common, **row.facts, **_timed(row, device, clock, repeats)}
        if found["op"] in ("copy", "checksum"):
            rates["of_copy" if found["op"] == "copy" else "of_read"] = found["gbps"]
        rows.append({**found, **{name: _over(found["gbps"], rates.get(name)) for name in ("of_copy", "of_read")}})
        write_json(file, "bench ops --sweep", rows)
    return rows


def planned(quick: bool) -> Iterator[Row]:
    """All rows, in order."""
    for make in (cases.rates, cases.decodes, cases.latents, cases.decode_options, sweep_others.cases):
        yield from (Row(*pair) for pair in make(quick))


def _timed(row: Row, device: str, clock: Clock, repeats: int) -> dict[str, Any]:
    try:
        call, nbytes = row.make(device)
        ms = median(clock.each(call, repeats))
        graph_ms = median(clock.each(clock.graphed(call), repeats))
    except (RuntimeError, ValueError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        return {"error": str(error).strip().splitlines()[0][:200]}
    return {"ms": ms, "graph_ms": graph_ms, "bytes": nbytes, "gbps": nbytes / graph_ms / 1e6}


def _over(gbps: float | None, rate: float | None) -> float | None:
    return None if gbps is None or not rate else gbps / rate


def summary(rows: list[dict[str, Any]]) -> str:
    """One line: the rates, bf16 as a share of the copy rate, the coded formats over bf16 where all else is equal."""
    same = lambda row: tuple(row[name] for name in ("group", "batch", "context_tokens", "page_size", "options"))  # noqa: E731
    decodes = [row for row in rows if row["op"] == "decode" and row["graph_ms"] and not row["latent"]]
    bf16 = {same(row): row for row in decodes if row["format"] == "bf16"}
    parts = [f"{len(rows)} rows, {sum(1 for row in rows if row['error'])} failed"]
    parts += [f"{row['op']} {row['gbps']:.0f} GB/s" for row in rows if row["op"] in ("copy", "checksum") and row["gbps"]]
    shares = [row["of_copy"] for row in bf16.values() if row["of_copy"] and not row["options"]]
    if shares:
        parts.append(f"bf16 {min(shares):.0%} to {max(shares):.0%} of copy")
    for name in dict.fromkeys(row["format"] for row in decodes if row["format"] != "bf16"):
        faster = [bf16[same(row)]["graph_ms"] / row["graph_ms"] for row in decodes if row["format"] == name and same(row) in bf16]
        if faster:
            parts.append(f"{name} {median(faster):.2f}x bf16")
    return "; ".join(parts)


def cell(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
