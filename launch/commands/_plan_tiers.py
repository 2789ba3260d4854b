"""`pikv plan --tiers`: the share of the cache in device, host and disk memory."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any, NamedTuple

from pikv_ds.errors import ConfigError
from pikv_ds.launch.output import human_bytes, print_table
from pikv_ds.tiers.plan import Tier, plan_tiers

GIB = 1 << 30


MEASURE = "measure"
FILES = ("disk", "nvme")


class Given(NamedTuple):
    """A tier of the command line."""

    name: str
    gib: float
    gb_per_s: float | None
    """None: measured here."""
    folder: str | None
    """In which files are measured."""


def tiers(text: str) -> list[Given]:
    """'device=8@1000,host=64@25' -> tiers; argparse type. In place of a bandwidth "measure", or a folder for files to be measured in."""
    try:
        found = [_given(*part.replace("@", "=", 2).split("=", 2)) for part in text.split(",")]
    except (ValueError, TypeError):
        found = []
    if not found or any(tier.gib < 0 or not tier.name or (tier.gb_per_s is not None and tier.gb_per_s <= 0) for tier in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not legal; give NAME=GIB@GB_PER_S[,...], fastest first: device=8@1000,host=64@25,disk=500@3; in place of a "
            f"bandwidth 'measure', or for a tier named disk or nvme a folder: disk=500@/scratch/kv"
        )
    return found


def _given(name: str, gib: str, speed: str) -> Given:
    if speed == MEASURE and name not in FILES:
        return Given(name, float(gib), None, None)
    if name in FILES and "/" in speed:
        return Given(name, float(gib), None, speed)
    return Given(name, float(gib), float(speed), None)


def _tier(given: Given, first: bool) -> Tier:
    from pikv_ds.tiers import bandwidth

    speed = given.gb_per_s
    if speed is None:
        of = bandwidth.of_files(given.folder) if given.folder else bandwidth.of_device() if first else bandwidth.of_host()
        speed = of / 1e9
    return Tier(name=given.name, capacity_bytes=given.gib * GIB, bytes_per_s=speed * 1e9)


def tier_rows(kv_bytes: int, num_layers: int, given: list[Given]) -> list[dict[str, Any]]:
    """A row per tier. measured: its bandwidth was, here and now; path: of the files."""
    found = [_tier(one, i == 0) for i, one in enumerate(given)]
    try:
        plan = plan_tiers(kv_bytes, num_layers, found)
    except ValueError as error:
        raise ConfigError(f"--tiers: {error}") from None
    return [
        {
            "tier": tier.name, "share": share, "tier_bytes": round(share * kv_bytes), "step_ms": 1e3 * seconds,
            "gb_per_s": tier.bytes_per_s / 1e9, "measured": one.gb_per_s is None, "path": one.folder,
        }
        for one, tier, share, seconds in zip(given, found, plan.shares, plan.seconds, strict=True)
    ]  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    print_table(
        "FlexGen's placement of that cache over tiers, for the shortest decode step",
        [
            {
                "tier": row["tier"],
                "share": f"{row['share']:.4f}",
                "bytes": human_bytes(row["tier_bytes"]),
                "GB/s": f"{row['gb_per_s']:.3g}" + " measured" * row["measured"],
                "ms per step": f"{row['step_ms']:.3f}",
            }
            for row in rows
        ],
    )
    share = max(int(1e4 * rows[0]["share"]) / 1e4, 1e-4)
    print(
        "ms per step: reading the whole cache on the first tier; for the others, the link that brings up what lies there or below. They\n"
        f"overlap: the largest is the step. To run it, on each rank:\n{offload_block(rows)}\n"
        "To keep the first tier's share and evict the rest:\n"
        f'"scheduling": {{"method": "flexgen", "budget_ratio": {share}, "drop_lower_tiers": true}}'
    )


def offload_block(rows: list[dict[str, Any]]) -> str:
    """The plan as the "offload" block: the first tier is the device; then host memory, and files where a tier is named disk or nvme."""
    gib = {"device_gib": rows[0]["tier_bytes"] / GIB}
    for row in rows[1:]:
        key = "nvme_gib" if row["tier"] in FILES else "host_gib"
        gib[key] = gib.get(key, 0) + row["tier_bytes"] / GIB
    block = {key: math.ceil(1e3 * value) / 1e3 for key, value in gib.items() if value}
    if "nvme_gib" in block:
        block["nvme_path"] = next((row["path"] for row in rows if row["path"]), "DIR")
    return f'"offload": {json.dumps(block)}'
