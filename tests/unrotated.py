"""The "compression" block of keys before their rotation; with all directions kept whatever is chosen must be as without a codec."""

from pathlib import Path

from pikv_ds.codecs.rope import default_inv_freq
from pikv_ds.spec import LayerSpec
from tests.calibrations import random_calibration
from tests.harness.driver import Driver

THETA = 100.0


def unrotated(layers: list[LayerSpec], folder: Path, *, rank: int | None = None, **options) -> dict:
    """rank: None = the whole width, that of the first layer."""
    path = folder / f"unrotated_{len(layers)}_{layers[0].k_dim}.safetensors"
    if not path.exists():
        random_calibration(layers, rotations=[default_inv_freq(THETA, spec.k_dim) for spec in layers]).save(path)
    return {"method": "lora_plus", "rank": rank or layers[0].k_dim, "rope": "pre", "calibration": str(path)} | options


def held(driver: Driver) -> list:
    """Positions in every table of both pools of all layers: [pool][row][table]."""
    return [pool.held for pool in driver.probe.all_pools]
