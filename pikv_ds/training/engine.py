"""Engine: what moves the weights of a part. The loop (fit.py) knows nothing else of DeepSpeed, Megatron-Core or torch's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .recorded import Window


class Optimizing(NamedTuple):
    """How far weights move. Warm-up and decay are linear."""

    steps: int
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    """Of the norm of all gradients."""

    def rate(self, step: int) -> float:
        """Of step 0, 1, ...: a factor of lr. Decays to a tenth."""
        left = 1 - 0.9 * min(step / max(self.steps, 1), 1.0)
        return min((step + 1) / max(self.warmup, 1), 1.0) * left


class Engine(Protocol):
    """Weights of one part over the data-parallel ranks. All methods but `loss` are called by all ranks alike."""

    name: str
    rank: int
    world: int
    """rank and world: of the data-parallel ranks, each of which has a window of its own."""
    writes: bool
    """On one rank of the job: it writes what is the same on all."""

    def loss(self, window: Window, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Of this rank's window, PartLoss.forward. generator None: the held-out objective, without gradients."""

    def backward(self, loss: Tensor, of: int) -> None:
        """One of `of` losses whose mean is the step's."""

    def step(self) -> None:
        """Move the weights by the mean gradient of all ranks."""

    def mean(self, values: Tensor) -> Tensor:
        """values [n] f64 of each rank -> their mean, the same on all ranks."""

    def weights(self) -> dict[str, Tensor]:
        """The part's state_dict, whole, f32 on the CPU. A copy."""

    def put(self, weights: dict[str, Tensor]) -> None:
        """Set them."""

    def save(self, folder: Path) -> None:
        """All that a later `load` needs to go on as if nothing had happened. folder is there, and the same on all ranks."""

    def load(self, folder: Path) -> None: ...
