"""A legal "routing" block and storage keys for every registered router, with the smallest budgets."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.spec import LayerSpec
from tests.harness.driver import layer
from tests.trained_gates import random_gate

Q_HEADS = 4
PINS = {"sink_tokens": 2, "recent_tokens": 5}


def routing(
    name: str,
    folder: Path,
    *,
    layers: int,
    shards: int,
    query_width: int,
    specs: list[LayerSpec] | None = None,
    fingerprint: Sequence[Tensor] = (),
    **more,
) -> dict:
    """A learned gate is written to `folder`: random, the same in every process. specs: its layers, None = full ones of 2 heads;
    fingerprint: of the model that it is for."""
    router = ROUTERS.get(name)
    block = {"method": name} | ({} if router.reads_all else PINS)
    if router.budgeted and not router.reads_all:
        block["budget_pages"] = 4
    if name == "learned":
        specs = specs or [layer(i, dim=query_width // Q_HEADS) for i in range(layers)]
        path = folder / f"gate_{layers}_{query_width}_{sum(spec.k_dim for spec in specs)}.safetensors"
        random_gate(path, specs, Q_HEADS, fingerprint)
        block["path"] = str(path)
    return block | more


def placement(name: str) -> dict:
    return {} if ROUTERS.get(name).needs_experts else {"placement": "position"}
