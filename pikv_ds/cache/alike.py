"""What a cache is made of, as names and values that must be alike on all ranks of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pikv_ds.codecs.weights import read_file
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.exchange.digest import digest
from pikv_ds.ops.build import load
from pikv_ds.spec import LayerSpec

OWN = ("pikv.timeout_s", "pikv.enabled", "pikv.preset")
"""Keys that may differ: how long a rank waits, and what is not there any more when a block has been read."""


def alike(
    config: PiKVConfig,
    layers: Sequence[LayerSpec],
    num_experts: int,
    dtype: torch.dtype,
    holders: tuple[tuple[int, ...], ...] | None,
    device: torch.device,
) -> list[tuple[str, str]]:
    """Pairs of a name and a value. A file is told by its content, for ranks may keep it in different folders. Reads those files once.

    The kernel that reads pages is one of them: other kernels differ in the last bits (`ops.mixed_kernels`).
    """
    found = [(name, _value(value)) for name, value in _flat("pikv", config.model_dump(mode="json")) if name not in OWN]
    for layer in layers:
        fields = {name: value for name, value in asdict(layer).items() if name != "first_head"}  # tensor-parallel ranks split heads
        found.append((f"layer {layer.layer_idx}", " ".join(f"{name}={value}" for name, value in fields.items())))
    if not config.ops.mixed_kernels:
        found.append(("attention kernel", load.kernel(device.type)))
    return [*found, ("experts", str(num_experts)), ("dtype", str(dtype)), ("holders of shards", str(holders))]


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value


def _value(value: Any) -> str:
    if isinstance(value, str) and value and Path(value).is_file():
        stat = Path(value).stat()
        return f"a file with digest {_digest(value, stat.st_mtime_ns, stat.st_size):016x}"
    return repr(value)


@lru_cache(maxsize=32)
def _digest(path: str, changed_ns: int, size: int) -> int:
    """Of tensors and metadata where it has them, for safetensors writes its metadata in any order."""
    try:
        tensors, about = read_file(path)
        names = sorted(tensors)
        about = repr((names, sorted(about.items()))).encode()
    except ValueError:  # a file of another kind, read by a method of another distribution
        names, tensors, about = [], {}, Path(path).read_bytes()
    return digest([torch.frombuffer(bytearray(about or b"0"), dtype=torch.uint8), *(tensors[name] for name in names)])
