"""`pikv plan --tiers`: the share of the cache in device, host and disk memory."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from pikv_ds.errors import ConfigError
from pikv_ds.launch.output import human_bytes, print_table
from pikv_ds.tiers.plan import Tier, plan_tiers

GIB = 1 << 30


def tiers(text: str) -> list[Tier]:
    """'device=8@1000,host=64@25' -> tiers; argparse type."""
    try:
        parts = [part.replace("@", "=").split("=") for part in text.split(",")]
        found = [Tier(name=name, capacity_bytes=float(gib) * GIB, bytes_per_s=float(speed) * 1e9) for name, gib, speed in parts]
    except ValueError:
        found = []
    if not found or any(tier.capacity_bytes < 0 or tier.bytes_per_s <= 0 or not tier.name for tier in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not legal; give NAME=GIB@GB_PER_S[,...], fastest first: device=8@1000,host=64@25,disk=500@3"
        )
    return found


def tier_rows(kv_bytes: int, num_layers: int, found: list[Tier]) -> list[dict[str, Any]]:
    try:
        plan = plan_tiers(kv_bytes, num_layers, found)
    except ValueError as error:
        raise ConfigError(f"--tiers: {error}") from None
    return [
        {"tier": tier.name, "share": share, "tier_bytes": round(share * kv_bytes), "step_ms": 1e3 * seconds}
        for tier, share, seconds in zip(found, plan.shares, plan.seconds, strict=True)
    ]


def show(rows: list[dict[str, Any]]) -> None:
    print_table(
        "FlexGen's placement of that cache over tiers, for the shortest decode step",
        [
            {
                "tier": row["tier"],
                "share": f"{row['share']:.4f}",
                "bytes": human_bytes(row["tier_bytes"]),
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
        key = "nvme_gib" if row["tier"] in ("disk", "nvme") else "host_gib"
        gib[key] = gib.get(key, 0) + row["tier_bytes"] / GIB
    block = {key: math.ceil(1e3 * value) / 1e3 for key, value in gib.items() if value}
    if "nvme_gib" in block:
        block["nvme_path"] = "DIR"
    return f'"offload": {json.dumps(block)}'
