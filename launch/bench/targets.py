"""What the compiled CPU ops are meant to reach, judged on the rows of `pikv bench ops`."""

from __future__ import annotations

from typing import Any, NamedTuple


class Target(NamedTuple):
    """At least (`at_least`) or at most a ratio, for the rows whose columns have these values."""

    text: str
    rows: dict[str, Any]
    limit: float
    at_least: bool = True


_SHAPES = ((1, 32768), (8, 8192))  # batch, context
_INTEGERS = ("int8", "int4")
# Over bf16 pages by the kernel of commit d67f97f. "fast": with ops.precision = "fast".
_OVER_FIRST = {
    "bf16": 1.0, "int8": 1.4, "int4": 1.75, "fp8_e4m3": 1.7, "fp4_e2m1": 1.65, "int8 fast": 1.7, "int4 fast": 2.4, "int2 fast": 2.4,
}  # fmt: skip


def _targets() -> list[Target]:
    found = []
    for batch, context in _SHAPES:
        shape = {"batch": batch, "context": context}
        at = f"B={batch} L={context // 1024}k"
        one, two = shape | {"threads": 1}, shape | {"threads": 2, "pages": "contiguous"}
        rows = one | {"format": "bf16", "pages": "contiguous", "baseline": "sdpa_grouped"}
        found.append(Target(f"bf16 at least 3 x sdpa_grouped, {at}, 1 thread", rows, 3.0))
        for name in _INTEGERS:
            for baseline, limit in (("dequant_sdpa", 15.0), ("sdpa_on_dequantised", 3.0)):
                rows = one | {"format": name, "pages": "contiguous", "baseline": baseline}
                found.append(Target(f"{name} at least {limit:.0f} x {baseline}, {at}, 1 thread", rows, limit))
        for name in ("bf16", *_INTEGERS):
            rows = one | {"format": name, "pages": "random", "baseline": "contiguous"}
            found.append(Target(f"{name} random pages at most 35 % over contiguous, {at}, 1 thread", rows, 1.35, at_least=False))
        for name, limit in _OVER_FIRST.items():
            rows = one | {"format": name, "pages": "contiguous", "baseline": "first_bf16"}
            found.append(Target(f"{name} at least {limit} x bf16 of d67f97f, {at}, 1 thread", rows, limit))
        for name in _INTEGERS:
            found.append(Target(f"{name} not slower than bf16, {at}, 2 threads", two | {"format": name, "baseline": "own_bf16"}, 1.0))
        rows = one | {"format": "bf16", "pages": "contiguous", "baseline": "stream"}
        found.append(Target(f"bf16 at least 75 % of stream, {at}, 1 thread", rows, 0.75))
    return found


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """target, measured, at_stream, met of each target whose row is among these; nothing for shapes and threads that have not been run.

    `measured` is the ratio of the row, baseline_ms / ms; its inverse where the target is a cost. `at_stream` is what it would be if decode
    read its pages at the rate of the stream: a target above it is out of reach of this machine's memory. A row that used more CPU time than
    its threads have (`valid` false) meets nothing.
    """
    table = []
    for target in _targets():
        for row in rows:
            if all(row[column] == value for column, value in target.rows.items()):
                measured = row["ratio"] if target.at_least else 1 / row["ratio"]
                reached = measured >= target.limit if target.at_least else measured <= target.limit
                stream_ms = row["bytes"] / row["stream_gbps"] / 1e6
                at_stream = row["baseline_ms"] / stream_ms if target.at_least else None
                table.append({
                    "target": target.text, "measured": measured, "at_stream": at_stream, "met": row["valid"] and reached,
                })  # fmt: skip
    return table
