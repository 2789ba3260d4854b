"""What a host hands back of a run, and the outcome of one rank that is made of it: plain data."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

SAMPLES = 12


@dataclass(kw_only=True)
class Result:
    """outputs: logits or attention outputs, whatever holds every number the run computed; its last tensor is sampled."""

    outputs: list[Tensor]
    tokens: list = field(default_factory=list)  # greedy, of every row
    kept: dict
    numbers: dict
    bytes_after_reset: int


def outcome_of(result: Result, collectives: dict[str, list[int]]) -> dict:
    """Groups of facts, see compare.py for which of them are compared where."""
    numbers = dict(result.numbers)
    read = {name: _rounded(numbers.pop(name)) for name in ("entries_read", "entries_visible")}
    numbers["bytes_after_reset"] = result.bytes_after_reset
    return {
        "digest": digest(result.outputs),
        "samples": samples(result.outputs[-1]),
        "tokens": result.tokens,
        "kept": result.kept,
        "read": read,
        "numbers": numbers,
        "collectives": dict(sorted(collectives.items())),
    }


def digest(tensors: list[Tensor]) -> str:
    """sha256 of bytes and shapes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def samples(tensor: Tensor) -> list[float]:
    """SAMPLES numbers spread evenly over a tensor, to six digits."""
    flat = tensor.flatten().double()
    at = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel())).long()
    return [round(value, 6) for value in flat[at].tolist()]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
