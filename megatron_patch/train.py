"""MegatronTraining: a part under Megatron-Core's DistributedDataParallel and distributed optimizer, beside the loop of training/fit.py."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import Adam, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from pikv_ds.errors import TrainingError
from pikv_ds.training.engine import Optimizing
from pikv_ds.training.part import PartLoss
from pikv_ds.training.recorded import Window

from .cpu_compat import cuda_literals_on_cpu

FOLDER = "megatron"
SHARDING = {"distrib_optim_sharding_type": "dp_reshardable"}
"""Of the forms that Megatron-Core 0.16 still saves, the one that it also loads into torch's Adam."""


class MegatronTraining:
    """pikv_ds.training.engine.Engine. Data-parallel ranks have a window each; tensor-parallel ranks compute the same, as windows have all
    heads (record.py), so weights and gradients are equal on them. f32; the optimizer's state is cut over the data-parallel ranks.

    A checkpoint is one of Megatron-Core, of which parts are pickled: load only what you have written. `said` names the optimizer.
    """

    name = "megatron"

    def __init__(self, model: PartLoss, optimizing: Optimizing, device: torch.device | str = "cpu") -> None:
        """parallel_state is initialised. model: the same first weights on every rank."""
        self.rank, self.world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.writes = dist.get_rank() == 0
        self.model, self.optimizing, self.steps = model.to(device), optimizing, 0
        with _on_cpu():
            self.ddp = DistributedDataParallel(_shape(), DistributedDataParallelConfig(use_distributed_optimizer=True), model)
            config = OptimizerConfig(
                optimizer="adam",
                lr=optimizing.lr,
                min_lr=0.0,
                weight_decay=optimizing.weight_decay,
                clip_grad=optimizing.clip,
                use_distributed_optimizer=True,
            )
            self.optimizer = get_megatron_optimizer(config, [self.ddp])
        self._clear()
        adam = f"{Adam.__name__} of {Adam.__module__.partition('.')[0]}"
        self.said = f"Megatron-Core {megatron.core.__version__}, distributed optimizer over {self.world} rank(s), {adam}"

    def loss(self, window: Window, generator: torch.Generator | None) -> dict[str, Tensor]:
        with torch.set_grad_enabled(generator is not None):
            return self.ddp(window, generator)

    def backward(self, loss: Tensor, of: int) -> None:
        (loss / of).backward()

    def step(self) -> None:
        with _on_cpu():
            self.ddp.finish_grad_sync()  # also begins it, as nothing is reduced while gradients are computed
            for group in self.optimizer.param_groups:
                group["lr"] = self.optimizing.lr * self.optimizing.rate(self.steps)
            moved, _, _ = self.optimizer.step()
            assert moved, "without a loss scale no step is skipped"
            self._clear()
        self.steps += 1

    def mean(self, values: Tensor) -> Tensor:
        group = parallel_state.get_data_parallel_group()
        values = values.to(next(self.model.parameters()).device)
        dist.all_reduce(values, group=group)
        return (values / self.world).cpu()

    def weights(self) -> dict[str, Tensor]:
        return {name: x.detach().to("cpu", torch.float32, copy=True) for name, x in self.model.module.state_dict().items()}

    def put(self, weights: dict[str, Tensor]) -> None:
        self.model.module.load_state_dict(weights)
        with _on_cpu():
            self.optimizer.reload_model_params()

    def save(self, folder: Path) -> None:
        own = folder / FOLDER
        if self.writes:
            own.mkdir(exist_ok=True)
        dist.barrier()
        with _on_cpu():
            dist_checkpointing.save(self._state(is_loading=False), str(own))
        dist.barrier()

    def load(self, folder: Path) -> None:
        own = folder / FOLDER
        if not own.is_dir():
            raise TrainingError(
                f"there is no Megatron-Core checkpoint in {folder.name!r}: it is of another engine, or was not written whole"
            )
        with _on_cpu(), torch.no_grad():  # Megatron-Core copies into parameters
            self._allocate()
            state = dist_checkpointing.load(self._state(is_loading=True), str(own))
            self.model.module.load_state_dict(state["part"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.steps = int(state["steps"])
        # torch's Adam counts the steps of each parameter. Megatron-Core 0.16 gives them one tensor, which counts for all at once.
        for one in self.optimizer.chained_optimizers:
            for kept in one.optimizer.state.values():
                if "step" in kept:
                    kept["step"] = torch.tensor(float(self.steps))

    def _allocate(self) -> None:
        """torch's Adam has no state before its first step, and Megatron-Core loads into what is there: one that moves nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self._clear()
        self.ddp.finish_grad_sync()
        self.optimizer.step()

    def _state(self, is_loading: bool) -> dict[str, Any]:
        """Sharded: the part is whole on every rank, the optimizer's state in pieces."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        part = make_sharded_tensors_for_checkpoint(
            self.model.module.state_dict(prefix="part.", keep_vars=True),
            "",
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=group,
        )
        optimizer = self.optimizer.sharded_state_dict(part, is_loading=is_loading, metadata=SHARDING)
        return {"part": {name.removeprefix("part."): x for name, x in part.items()}, "optimizer": optimizer, "steps": self.steps}

    def _clear(self) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()


def _shape() -> TransformerConfig:
    """DistributedDataParallel asks it for parallelism, and nothing for layers."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=parallel_state.get_tensor_model_parallel_world_size(),
        kv_channels=8,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


def _on_cpu() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if torch.cuda.is_available() else cuda_literals_on_cpu()
