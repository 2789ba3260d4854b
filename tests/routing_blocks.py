"""A legal "routing" block and storage keys for every registered router, with the smallest budgets."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from pikv_ds.routers import ROUTERS

PINS = {"sink_tokens": 2, "recent_tokens": 5}


def routing(name: str, folder: Path, *, layers: int, shards: int, query_width: int, **more) -> dict:
    """A learned gate is written to `folder`: random, the same in every process."""
    router = ROUTERS.get(name)
    block = {"method": name} | ({} if router.reads_all else PINS)
    if router.budgeted and not router.reads_all:
        block["budget_pages"] = 4
    if name == "learned":
        path = folder / f"gate_{layers}_{shards}_{query_width}.safetensors"
        gate = torch.randn(layers, shards, query_width, generator=torch.Generator().manual_seed(7))
        save_file({"gate": gate}, path)
        block["path"] = str(path)
    return block | more


def placement(name: str) -> dict:
    return {} if ROUTERS.get(name).needs_experts else {"placement": "position"}
