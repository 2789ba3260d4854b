"""Weights of a Megatron-Core model in a dist checkpoint, saved in one layout of tensor, expert and pipeline parallelism, loaded in another.

PiKV adds no parameter, so an enabled model saves what the host's would, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from pikv_ds.errors import UnsupportedError

from .checkpoint_folder import find_weights, read_common, said_by
from .checkpoint_names import Shapes, map_tensors, metadata_for, model_keys, split_objects, stored_as
from .version import check_feature

_T = TypeVar("_T")
_SHOWN = 12  # names in a message


def save_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """Write the weights of `model`, enabled or not, to `folder`. Collective over the job.

    Megatron-Core writes from processes of its own that import the script again: it needs `if __name__ == "__main__"`.
    """
    check_feature("checkpoints")
    folder = Path(folder)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(_sharded(model, {}), str(folder))


def load_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """Fill `model`, enabled or not, from a dist checkpoint of any layout. Collective over the job; the weights go through host memory.

    folder: what save_checkpoint wrote, or Megatron-LM's: the folder of --save with its latest_checkpointed_iteration.txt, or an iter_* of
    it. Arguments, optimizer and random states beside the weights are not used. Layers of Transformer Engine and grouped-GEMM experts may
    have saved what local layers load, and keys may be by layer or for all layers.

    What fails on one rank is raised on all of them, and every parameter is then as it was. Megatron-Core's format holds pickled metadata:
    load what you trust.

    Raises:
        FileNotFoundError: there is no checkpoint in `folder`.
        UnsupportedError: its format is not torch_dist, it can't be read, or tensors differ in name or in global shape; names are given.
    """
    check_feature("checkpoints")
    weights = _on_all_ranks(lambda: find_weights(folder))
    _on_all_ranks(lambda: read_common(weights))  # by each rank alone, so that in the load below no rank is missed by the others
    stored = _on_all_ranks(lambda: _stored(weights))
    wanted, ignored = _on_all_ranks(lambda: _wanted(model, stored))
    _check(_keys_of(wanted), stored, weights)
    state = _on_all_ranks(lambda: _read(wanted, weights) | ignored)
    _on_all_ranks(lambda: _check_state(model, state))
    model.load_state_dict(state, strict=False)


def _on_all_ranks(what: Callable[[], _T]) -> _T:
    """what(), where it succeeded on every rank of the job. Raises this rank's error, or one that names another's."""
    result, own = None, None
    try:
        result = what()
    except Exception as error:  # noqa: BLE001  of any kind, and the other ranks hear of it
        own = error
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    failed = next((rank for rank, words in enumerate(said) if words is not None), None)
    if failed is not None:
        raise UnsupportedError(f"the checkpoint was not loaded, as rank {failed} failed: {said[failed]}")
    return result  # type: ignore[return-value]


def _sharded(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": group} | metadata)


def _stored(weights: Path) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of the tensors of the model."""
    try:
        found = dist_checkpointing.load_tensors_metadata(str(weights))
    except (Exception, CheckpointException) as error:
        raise UnsupportedError(f"the index of the checkpoint in {str(weights)!r} can't be read: {said_by(error)}") from error
    return {key: tuple(found[key].global_shape) for key in model_keys(found)}


def _wanted(model: nn.Module, stored: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's sharded state dict under the names of the checkpoint, with memory of its own; and entries that are not loaded."""
    layers = model.config.num_layers
    return split_objects(map_tensors(_sharded(model, metadata_for(stored)), lambda tensor: stored_as(tensor, stored, layers)))


def _keys_of(wanted: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of what all ranks want."""
    built = map_tensors(wanted, lambda tensor: tensor)
    apply_factories(built)
    own = {tensor.key: tuple(tensor.global_shape) for tensor in _tensors(built)}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    return {key: shape for keys in of_ranks for key, shape in keys.items()}


def _check(wanted: Shapes, stored: Shapes, weights: Path) -> None:
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unexpected:
        said = [f"{len(missing)} of the model's {len(wanted)} tensors are missing there: {_listed(missing)}"] if missing else []
        said += [f"{len(unexpected)} of its {len(stored)} have no place in the model: {_listed(unexpected)}"] if unexpected else []
        raise UnsupportedError(f"the checkpoint in {str(weights)!r} is of another model. {'; '.join(said)}")
    differing = sorted(key for key in wanted if wanted[key] != stored[key])
    if differing:
        key = differing[0]
        raise UnsupportedError(
            f"{key} has global shape {stored[key]} in the checkpoint in {str(weights)!r} and {wanted[key]} in the model "
            f"({len(differing)} tensors differ: {_listed(differing)}); build the model with the checkpoint's configuration"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _read(wanted: dict[str, Any], weights: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load({"model": wanted}, str(weights))["model"]
    except (Exception, CheckpointException) as error:
        raise UnsupportedError(f"the weights in {str(weights)!r} can't be read: {said_by(error)}") from error


def _check_state(model: nn.Module, state: dict[str, Any]) -> None:
    """That load_state_dict will not stop half way."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    read = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    if own != read:
        names = sorted(name for name in own.keys() | read.keys() if own.get(name) != read.get(name))
        raise UnsupportedError(f"what was read does not fit the model: {_listed(names)} differ in name or shape")


def _tensors(state: Any) -> list[ShardedTensor]:
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [state] if isinstance(state, ShardedTensor) else [tensor for value in values for tensor in _tensors(value)]
