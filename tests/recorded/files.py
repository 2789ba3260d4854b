"""Files that configurations name: "FILE:kind" in a case stands for the path of one, random and the same on all ranks."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from pikv_ds.spec import LayerSpec
from tests.calibrations import random_calibration
from tests.recorded import probe
from tests.trained_gates import random_gate

THETA = 100.0  # of the rotation that layers without a model are said to have


def with_files(config, folder: Path, layers: list[LayerSpec], model=None):
    """The configuration with paths in place of "FILE:calibration", "FILE:router_gate" (of the router learned), "FILE:storage_gate"."""
    if isinstance(config, dict):
        return {key: with_files(value, folder, layers, model) for key, value in config.items()}
    if not isinstance(config, str) or not config.startswith("FILE:"):
        return config
    path = folder / f"{config.removeprefix('FILE:')}.safetensors"
    MADE[path.stem](path, layers, model)
    return str(path)


def _calibration(path: Path, layers: list[LayerSpec], model) -> None:
    norms, rotations = None, [1.0 / THETA ** (torch.arange(0, spec.k_dim, 2).float() / spec.k_dim) for spec in layers]
    if model is not None:
        norms, rotations = probe.calibration_facts(model)
    random_calibration(layers, norms, rotations).save(path)


def _router_gate(path: Path, layers: list[LayerSpec], model) -> None:
    """Of four query heads."""
    random_gate(path, layers)


def _storage_gate(path: Path, layers: list[LayerSpec], model) -> None:
    width = layers[0].num_kv_heads * layers[0].k_dim
    save_file({"gate": torch.randn(len(layers), 8, width, generator=torch.Generator().manual_seed(5))}, path)


MADE = {"calibration": _calibration, "router_gate": _router_gate, "storage_gate": _storage_gate}
