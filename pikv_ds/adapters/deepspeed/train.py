"""DeepSpeedTraining: a part under a DeepSpeed engine, ZeRO stage 0 to 3, beside the loop of pikv_ds/training/fit.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn

from pikv_ds.errors import TrainingError
from pikv_ds.training.engine import Optimizing
from pikv_ds.training.part import PartLoss
from pikv_ds.training.recorded import Window

from .shm import unlink_own_buffers
from .train_adam import adam_of
from .train_config import is_offloaded, stage_of

TAG = "deepspeed"


class DeepSpeedTraining:
    """pikv_ds.training.engine.Engine over `deepspeed.initialize`. Weights are those of f32, whatever a forward pass runs in.

    bf16: the part's module runs in bf16; what it is given is cast to it, and what it returns to f32, where the loss is. `said` names the
    optimizer, the schedule and the stage. A checkpoint is DeepSpeed's own, which is a pickle: load only what you have written.
    """

    name = "deepspeed"

    def __init__(self, model: PartLoss, optimizing: Optimizing, config: Mapping[str, Any]) -> None:
        """config: `part` of train_config.read. torch.distributed is initialised. Collective."""
        self.rank, self.world, self.writes = dist.get_rank(), dist.get_world_size(), dist.get_rank() == 0
        self.module, self.bf16 = model.module, bool((config.get("bf16") or {}).get("enabled"))
        self.stage, self._turn = stage_of(config), 0
        if self.bf16:
            model.module.register_forward_pre_hook(_to_bf16, with_kwargs=True)
            model.module.register_forward_hook(_to_f32)
        trained = [p for p in model.parameters() if p.requires_grad]
        own, said = {}, ["the optimizer of --config"]
        if "optimizer" not in config:
            adam = adam_of(optimizing, get_accelerator().device_name(), offload=is_offloaded(config))
            own, said = {"optimizer": adam.make}, [adam.said]
        if "scheduler" not in config:
            own["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, optimizing.rate)
        else:
            said.append("the scheduler of --config")
        self.engine = deepspeed.initialize(model=model, model_parameters=trained, config=dict(config), dist_init_required=False, **own)[0]
        dist.barrier()
        unlink_own_buffers()
        self.said = "; ".join([f"DeepSpeed {deepspeed.__version__}, ZeRO stage {self.stage}{', bf16' if self.bf16 else ''}", *said])

    def loss(self, window: Window, generator: torch.Generator | None) -> dict[str, Tensor]:
        with torch.set_grad_enabled(generator is not None):
            return self.engine(window, generator)

    def backward(self, loss: Tensor, of: int) -> None:
        self._turn += 1
        self.engine.set_gradient_accumulation_boundary(self._turn == of)
        self.engine.backward(loss / of)

    def step(self) -> None:
        self.engine.step()
        self._turn = 0

    def mean(self, values: Tensor) -> Tensor:
        values = values.to(self.engine.device)
        dist.all_reduce(values)
        return (values / self.world).cpu()

    def weights(self) -> dict[str, Tensor]:
        found = self.module.state_dict(keep_vars=True)
        return {name: _whole(x).detach().to("cpu", torch.float32, copy=True) for name, x in found.items()}

    def put(self, weights: dict[str, Tensor]) -> None:
        own = self.module.state_dict(keep_vars=True)
        if own.keys() != weights.keys():
            raise TrainingError(f"weights to put have the names {sorted(weights)}, the part has {sorted(own)}")
        for name, x in own.items():
            value = weights[name].to(self.engine.device)
            with deepspeed.zero.GatheredParameters([x], modifier_rank=0, enabled=self.stage == 3 and isinstance(x, nn.Parameter)):
                x.data.copy_(value)
            if _is_in_pieces(x):
                safe_set_full_fp32_param(x, value.float())

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        dist.barrier()

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise TrainingError(
                f"DeepSpeed found no checkpoint {TAG!r} in {folder.name!r}: it is of another engine, or was not written whole"
            )


def _is_in_pieces(x: Tensor) -> bool:
    """A rank that has no piece of it takes part in putting it together all the same."""
    return hasattr(x, "ds_id") or hasattr(x, "_hp_mapping")


def _whole(x: Tensor) -> Tensor:
    """The weight in f32, from where ZeRO keeps it. Collective for such a parameter."""
    return safe_get_full_fp32_param(x) if _is_in_pieces(x) else x


def _to_bf16(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return tuple(map(_cast, args)), {name: _cast(value) for name, value in kwargs.items()}


def _cast(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value


def _to_f32(module: nn.Module, args: tuple, result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_to_f32(module, args, one) for one in result)
    return result.float() if isinstance(result, Tensor) and result.is_floating_point() else result
