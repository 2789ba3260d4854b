"""Where in a folder that a user names the weights are, in which format, and what was saved beside them."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config
from torch.distributed.checkpoint.api import CheckpointException

from pikv_ds.errors import UnsupportedError

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = "torch_dist"
_CONVERT = f"load it with Megatron-LM in the layout it was saved in and save it again with --ckpt-format {FORMAT}"


def find_weights(folder: str | Path) -> Path:
    """The folder that dist_checkpointing.save wrote: `folder` itself, or the one that Megatron-LM's tracker file in it names.

    Raises:
        FileNotFoundError: there is none.
        UnsupportedError: the weights are there in a format that Megatron-Core does not read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give the folder of --save, or one of its iter_*")
    if (folder / "metadata.json").is_file() or not (folder / TRACKER).is_file():
        weights = folder
    else:
        weights = folder / _named(folder / TRACKER)
        if not weights.is_dir():
            raise FileNotFoundError(f"{TRACKER} in {str(folder)!r} names {weights.name}, which is not there; give one of {_saved(folder)}")
    _check_format(weights)
    return weights


def _named(tracker: Path) -> str:
    word = tracker.read_text(encoding="utf-8").strip()
    if word == "release":
        return word
    if not word.isdecimal():
        raise FileNotFoundError(f"{str(tracker)!r} holds {word[:40]!r}: legal is the number of an iteration, or 'release'")
    return f"iter_{int(word):07d}"


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and (path.name.startswith("iter_") or path.name == "release"))


def _check_format(weights: Path) -> None:
    config = maybe_load_config(str(weights))
    if config is not None:
        if config.sharded_backend != FORMAT:
            raise UnsupportedError(
                f"{str(weights)!r} is of format {config.sharded_backend!r}; Megatron-Core reads {FORMAT!r} only; {_CONVERT}"
            )
        return
    if any(path.name.startswith("mp_rank_") for path in weights.iterdir()):
        raise UnsupportedError(f"{str(weights)!r} is of Megatron-LM's format 'torch' (mp_rank_*), one file per rank; {_CONVERT}")
    if (weights / ".metadata").is_file():
        raise UnsupportedError(f"{str(weights)!r} is of format 'torch_dcp' or 'fsdp_dtensor', which Megatron-FSDP writes; {_CONVERT}")
    found = _saved(weights)
    raise FileNotFoundError(
        f"{str(weights)!r} holds no dist checkpoint (metadata.json) and no {TRACKER}; "
        + (f"give one of {found}" if found else "give the folder that dist_checkpointing.save wrote, or the one of --save")
    )


def read_common(weights: Path) -> dict[str, Any]:
    """What is not sharded: args, iteration, what the optimizer shares. Needs no process group.

    Raises: UnsupportedError when it is not there, or holds objects of classes that torch does not load.
    """
    try:
        return dist_checkpointing.load_common_state_dict(str(weights))
    except pickle.UnpicklingError as error:
        reason = str(error).split("Please file")[0].strip()
        raise UnsupportedError(
            f"what was saved beside the weights in {str(weights)!r} can't be read: {reason} Name the class in "
            f"torch.serialization.add_safe_globals([...]) first, if you trust it"
        ) from error
    except (CheckpointingException, CheckpointException, OSError, RuntimeError, EOFError) as error:
        raise UnsupportedError(f"what was saved beside the weights in {str(weights)!r} can't be read: {said_by(error)}") from error


def said_by(error: BaseException) -> str:
    """What happened, in one line; torch.distributed.checkpoint's exception, which is no Exception, has those of all ranks in it."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {said_by(own)}" for rank, (own, _) in error.failures.items())
    return f"{type(error).__name__}: {error}"


def checkpoint_args(folder: str | Path) -> Namespace:
    """The arguments of the training script, as Megatron-LM saved them in `folder` (see find_weights).

    Raises: FileNotFoundError, UnsupportedError; the latter also for a checkpoint without arguments.
    """
    weights = find_weights(folder)
    common = read_common(weights)
    args = common.get("args")
    if args is None:
        raise UnsupportedError(
            f"the checkpoint in {str(weights)!r} has no 'args' (it has {sorted(common) or 'weights only'}), so it does not say what model "
            f"it is of; build the model yourself, or name a transformers folder of the same model"
        )
    return Namespace(**(args if isinstance(args, dict) else vars(args)))
