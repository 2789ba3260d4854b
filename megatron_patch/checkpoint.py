"""Weights of a Megatron-Core model in a dist checkpoint, saved in one layout of tensor and expert parallelism and loaded in another.

PiKV adds no parameter, so an enabled model saves what the host's would, under the same names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import nn

from pikv_ds.errors import UnsupportedError

from .version import check_feature


def save_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """Write the weights of `model`, enabled or not, to `folder`. Collective over the job.

    Megatron-Core writes from processes of its own that import the script again: it needs `if __name__ == "__main__"`.
    """
    check_feature("checkpoints")
    folder = Path(folder)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(_sharded(model), str(folder))


def load_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """Fill `model`, enabled or not, from a dist checkpoint of any layout. Collective over the job.

    Megatron-Core's format holds pickled metadata: load what you trust.

    Raises:
        FileNotFoundError: there is no dist checkpoint in `folder`.
        UnsupportedError: tensors of the checkpoint and of the model differ in name or in global shape; the model is as it was.
    """
    check_feature("checkpoints")
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise FileNotFoundError(f"{str(folder)!r} holds no dist checkpoint; give the folder that dist_checkpointing.save wrote")
    _check(model, folder)
    state = dist_checkpointing.load(_sharded(model), str(folder))
    model.load_state_dict(state, strict=True)


def _sharded(model: nn.Module) -> dict[str, Any]:
    return model.sharded_state_dict(metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)})


def _check(model: nn.Module, folder: str | Path) -> None:
    wanted = _sharded(model)
    apply_factories(wanted)
    wanted = {tensor.key: tuple(tensor.global_shape) for tensor in _tensors(wanted)}
    stored = {key: tuple(tensor.global_shape) for key, tensor in dist_checkpointing.load_tensors_metadata(str(folder)).items()}
    missing, differing = (
        sorted(wanted.keys() - stored.keys()),
        sorted(key for key in wanted.keys() & stored.keys() if wanted[key] != stored[key]),
    )
    if missing:
        raise UnsupportedError(
            f"the checkpoint in {str(folder)!r} has no {missing[0]!r} ({len(missing)} of the model's {len(wanted)} tensors are missing); "
            f"it was saved from another model, or from Transformer Engine or grouped-GEMM layers"
        )
    if differing:
        key = differing[0]
        raise UnsupportedError(
            f"{key} has global shape {stored[key]} in the checkpoint in {str(folder)!r} and {wanted[key]} in the model "
            f"({len(differing)} tensors differ); build the model with the checkpoint's configuration"
        )


def _tensors(state: Any) -> list[ShardedTensor]:
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [state] if isinstance(state, ShardedTensor) else [tensor for value in values for tensor in _tensors(value)]
