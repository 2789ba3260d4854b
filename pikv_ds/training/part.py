"""A learned part: which module is trained, on which loss, and by what one knows that it has learned something."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from .recorded import ModelFacts, Window, Windows


class LearnedPart(ABC):
    """Options are keyword-only constructor arguments with defaults; `pikv train PART --set NAME=VALUE` gives them.

    A part keeps no weights. Its module is the one that the method runs at inference, and lies with it; the file of the part holds the
    module's state_dict. Forward passes go through `module(...)`, never through its methods: engines that partition weights gather them
    there.
    """

    name: ClassVar[str]
    serves: ClassVar[str]
    """The key and method that read the file: "routing.method = learned"."""
    wants_questions: ClassVar[bool] = False
    """True: data without a window that has a question is refused."""

    @abstractmethod
    def options(self) -> dict[str, object]:
        """What build() followed from, for the file: JSON values, keyword arguments of the constructor."""

    @abstractmethod
    def build(self, facts: ModelFacts) -> nn.Module:
        """The module with its first weights, by torch's generator, f32 on the CPU. Raises: ConfigError for a model it can't serve."""

    def begin(self, module: nn.Module, data: Windows) -> None:  # noqa: B027
        """First weights that follow from data, in place, before an engine has the module. The same on all ranks."""

    @abstractmethod
    def loss(self, module: nn.Module, window: Window, generator: torch.Generator) -> dict[str, Tensor]:
        """0-d tensors; "loss" is minimised, the others are drawn. generator: of this step and rank, on the CPU."""

    @abstractmethod
    def held_out(self, module: nn.Module, window: Window) -> dict[str, Tensor]:
        """0-d tensors of a window that is not trained on; "objective", the higher the better, stops the fit early. No gradients."""


class PartLoss(nn.Module):
    """A part's loss as a forward pass: what an engine wraps."""

    def __init__(self, part: LearnedPart, module: nn.Module) -> None:
        super().__init__()
        self.part, self.module = part, module

    def forward(self, window: Window, generator: torch.Generator | None) -> dict[str, Tensor]:
        """generator None: the held-out objective."""
        return self.part.held_out(self.module, window) if generator is None else self.part.loss(self.module, window, generator)
