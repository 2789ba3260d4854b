"""`pikv bench merge`: merging partial attention by the op and by its torch reference, in turns, one thread, and the error of both.

Shapes are [batch, columns, heads, head_dim] of one partial; sets are shards, pools or ranks. Columns:
    from                 "stack": contiguous; "ranks": out and lse lie beside each other in rows, as an all-gather leaves them
    op_us, torch_us      CPU time of one call: medians of the rounds
    op / torch           median of the rounds' ratios, and their 20th and 80th percentile; below 1, the op is faster
    op_rms, torch_rms    relative RMS error of out against fp64 on the same partials
    op_lse, torch_lse    largest error of lse against fp64
"""

from __future__ import annotations

import argparse
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from pikv_ds.launch.output import print_table, write_json

from .ops import measure

if TYPE_CHECKING:
    import torch

HEADS, DIM = 32, 128
SHAPES = {"decode": (1, 1), "decode, batch 8": (8, 1), "prefill chunk": (1, 512)}  # batch, columns
SETS = (2, 4, 8)
_SHOWN = ("sets", "from", "op_us", "torch_us", "op / torch", "p20", "p80", "op_rms", "torch_rms", "op_lse", "torch_lse")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="rounds (default 15)")


def run(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)
    rows = []
    for name, (batch, columns) in SHAPES.items():
        found = [_row(name, (batch, columns, HEADS, DIM), sets, how, args.repeats) for sets in SETS for how in ("stack", "ranks")]
        title = f"merge, {name}: [{batch}, {columns}, {HEADS}, {DIM}], 1 thread"
        print_table(title, [{key: _short(row[key]) for key in _SHOWN} for row in found])
        rows += found
    write_json(args.json, f"bench merge --repeats {args.repeats}", rows)
    return 0


def _row(name: str, shape: tuple[int, int, int, int], sets: int, how: str, repeats: int) -> dict[str, Any]:
    from pikv_ds.ops import merge
    from pikv_ds.ops.build import load
    from pikv_ds.ops.reference.merge_partials import merge_partials as reference

    from .errors import _largest, _rms

    out, lse = _partials(shape, sets, how)
    times = measure({"op": lambda: merge(out, lse), "torch": lambda: reference(out, lse)}, repeats)
    ratios = [a / b for a, b in zip(times["op"].cpu, times["torch"].cpu, strict=True)]
    fifths = quantiles(ratios, n=5) if repeats > 1 else ratios * 4
    row = {
        "shape": name, "sizes": list(shape), "sets": sets, "from": how,
        "implementation": load.ensured("cpu"), "threads": 1, "repeats": repeats,
        "op_us": 1e3 * times["op"].cpu_ms, "torch_us": 1e3 * times["torch"].cpu_ms,
        "op / torch": median(ratios), "p20": fifths[0], "p80": fifths[3],
    }  # fmt: skip
    exact, exact_lse = reference(out.double(), lse.double())
    for label, call in (("op", merge), ("torch", reference)):
        found, found_lse = call(out, lse)
        row |= {f"{label}_rms": _rms(found, exact), f"{label}_lse": _largest(found_lse, exact_lse)}
    return row


def _partials(shape: tuple[int, int, int, int], sets: int, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """out [sets, *shape] f32 and lse [sets, B, T, H] f32, lse with a standard deviation of 2."""
    import torch

    generator, (B, T, H, D) = torch.Generator().manual_seed(sets), shape
    out, lse = torch.randn(sets, *shape, generator=generator), 2 * torch.randn(sets, B, T, H, generator=generator)
    if how == "stack":
        return out, lse
    gathered = torch.cat([out.view(sets, B * T, H * D), lse.view(sets, B * T, H)], -1)
    outs, lses = gathered.split([H * D, H], -1)
    return outs.reshape(-1, B, T, H, D), lses.reshape(-1, B, T, H)


def _short(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value
