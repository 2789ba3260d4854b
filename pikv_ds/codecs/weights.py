"""Read a safetensors file of weights and check what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

Axes = tuple[str | int, ...]
"""Of a tensor, per dimension: its size, or a name. A name stands for the same size wherever it occurs in a file."""


def read_file(path: str | Path, option: str = "path") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its metadata. option: what the user set, for the message.

    Raises: ValueError when the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{option} = a readable safetensors file, got {str(path)!r}: {error}") from error


def read_weights(path: str | Path, wanted: Mapping[str, Axes], option: str = "path") -> dict[str, Tensor]:
    """The `wanted` tensors of a file, as it holds them; what else is in it is not looked at.

    Raises: ValueError when one is missing, of another shape or not finite, or when the file can't be read.
    """
    tensors, _ = read_file(path, option)
    if not _fit(tensors, wanted) or not_finite({name: tensors[name] for name in wanted}):
        needed = ", ".join(f"{name!r} ({', '.join(map(str, axes))})" for name, axes in wanted.items())
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{option} = a file of finite weights, but {str(path)!r} holds {found}; needed: {needed}")
    return {name: tensors[name] for name in wanted}


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with a value that is not a finite number."""
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


def _fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Axes]) -> bool:
    sizes: dict[str, int] = {}
    for name, axes in wanted.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape is None or len(shape) != len(axes):
            return False
        if any(size != (axis if isinstance(axis, int) else sizes.setdefault(axis, size)) for size, axis in zip(shape, axes, strict=True)):
            return False
    return True
