"""What DeepSpeed's optimizers keep of a parameter, as tensors of its shape: torch's own, and ZeRO's, which lie in pieces over ranks."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from pikv_ds.adapters.trained import Trained

Full = dict[str, Tensor]  # by name, of a parameter's shape
MASTER = "fp32"


class Kept(Protocol):
    def read(self, parameter: nn.Parameter) -> Full:
        """Tensors, or copies. Collectives: those of the parameter's data-parallel group."""

    def write(self, parameter: nn.Parameter, found: Full) -> None: ...

    def pending(self) -> bool:
        """Asked before a move reads anything: whether gradients wait for a step."""


class OfTorch:
    """A torch optimizer on the model's parameters, or none."""

    def __init__(self, optimizer: torch.optim.Optimizer | None, parameters: list[nn.Parameter]) -> None:
        self.trained, self.parameters = Trained([] if optimizer is None else [optimizer]), parameters

    def read(self, parameter: nn.Parameter) -> Full:
        return {name: x for name, x in self.trained.beside(parameter).items() if x.shape == parameter.shape}

    def write(self, parameter: nn.Parameter, found: Full) -> None:
        for name, own in self.read(parameter).items():
            own.copy_(found[name])

    def pending(self) -> bool:
        return any(parameter.grad is not None for parameter in self.parameters)


class OfZero:
    """ZeRO stage 1 and 2, by DeepSpeed's own access to whole tensors."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, parameters: list[nn.Parameter]) -> None:
        self.optimizer, self.parameters = optimizer, parameters

    def read(self, parameter: nn.Parameter) -> Full:
        found = {MASTER: safe_get_full_fp32_param(parameter)}
        return found | {key: safe_get_full_optimizer_state(parameter, key) for key in self._keys()}

    def write(self, parameter: nn.Parameter, found: Full) -> None:
        safe_set_full_fp32_param(parameter, found[MASTER])
        for key in self._keys():
            safe_set_full_optimizer_state(parameter, found[key], key)

    def pending(self) -> bool:
        self._link()
        return any(x is not None for x in self.optimizer.averaged_gradients.values()) or any(p.grad is not None for p in self.parameters)

    def _link(self) -> None:
        """DeepSpeed 0.19.8 links parameters to their state behind the first group's first step, when the other groups, those of experts
        among them, have none; and a checkpoint that is loaded brings other tensors."""
        state = self.optimizer.optimizer.state
        for group, flat in zip(self.optimizer.bit16_groups, self.optimizer.single_partition_of_fp32_groups, strict=True):
            if flat in state:
                lazy_init_hp_params_optimizer_state(group, flat, state)

    def _keys(self) -> list[str]:
        """Of the state per element; none before the first step. Every rank has whole experts, so all say the same."""
        mappings = (getattr(parameter, "_hp_mapping", None) for parameter in self.parameters)
        return next((sorted(one.optim_fragment) for one in mappings if one is not None and one.optim_fragment), [])


def kept_by(engine: Any, parameters: list[nn.Parameter]) -> Kept | str:
    """Of the engine's optimizer; or why its state can't follow an expert."""
    optimizer = getattr(engine, "optimizer", None)
    if type(optimizer).__name__ in ("DummyOptim", "NoneType") or type(optimizer) is torch.optim.Optimizer:
        optimizer = None
    if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
        return OfTorch(optimizer, parameters)
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        return OfZero(optimizer, parameters)
    return (
        f"{type(optimizer).__name__} has the state of experts and routers in pieces that don't follow them; train with ZeRO stage 0 in "
        f"fp32, or with stage 1 or 2 without offload"
    )
