"""The engines that `pikv train --engine` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pikv_ds.errors import ConfigError

if TYPE_CHECKING:
    from pikv_ds.training.engine import Engine, Optimizing
    from pikv_ds.training.part import PartLoss

ENGINES = ("local", "deepspeed", "megatron")


def check_engine(name: str, ranks: int, config: str | None) -> None:
    """Raises: ConfigError for an engine that is not there yet, or an argument that this one would not look at."""
    if name != "local":
        raise ConfigError(f"--engine {name}: this version trains with 'local' only, torch's AdamW in one process; use --engine local")
    if ranks != 1:
        raise ConfigError(f"--ranks {ranks} with --engine local, which is one process; use --ranks 1")
    if config is not None:
        raise ConfigError(f"--config {config} is DeepSpeed's, and --engine local does not read it; leave it out")


def engine_of(name: str, model: PartLoss, optimizing: Optimizing, device: str) -> Engine:
    from pikv_ds.training.local import LocalEngine

    assert name == "local", name
    return LocalEngine(model, optimizing, device)
