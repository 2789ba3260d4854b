"""The hosts of a fit: the frozen model as each runs it, windows of it, and the engine that moves the weights of a part."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pikv_ds.errors import ConfigError

from .data import Tokens
from .engines import DEFAULT_LR

if TYPE_CHECKING:
    from torch import Tensor

    from pikv_ds.training.engine import Engine, Optimizing
    from pikv_ds.training.part import PartLoss


class Host(NamedTuple):
    """record: tokens -> `Windows` with the model's `layers`. fingerprint: [H, D] of every layer. said: on how the model runs, or ""."""

    record: Callable[[Tokens], Any]
    fingerprint: list[Tensor]
    engine: Callable[[PartLoss, Optimizing], Engine]
    lr: float
    said: str = ""


def open_host(args: argparse.Namespace, folder: Path) -> Host:
    """For engines of several processes torch.distributed is initialised, and this is collective."""
    return {"local": _local, "deepspeed": _deepspeed, "megatron": _megatron}[args.engine](args, folder)


def _load(args: argparse.Namespace, folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from pikv_ds.launch.device import own_device

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype), local_files_only=True).eval().to(own_device())


def _rate(args: argparse.Namespace) -> float:
    return DEFAULT_LR if args.lr is None else args.lr


def _local(args: argparse.Namespace, folder: Path) -> Host:
    from pikv_ds.adapters.hf.record import Recorder
    from pikv_ds.launch.device import own_device
    from pikv_ds.training.local import LocalEngine

    model = _load(args, folder)
    fingerprint = Recorder(model, _nothing()).fingerprint()
    return Host(lambda tokens: Recorder(model, *tokens), fingerprint, lambda loss, how: LocalEngine(loss, how, own_device()), _rate(args))


def _deepspeed(args: argparse.Namespace, folder: Path) -> Host:
    import torch.distributed as dist

    from pikv_ds.adapters.deepspeed import train_config
    from pikv_ds.adapters.deepspeed.train import DeepSpeedTraining
    from pikv_ds.adapters.deepspeed.train_base import any_rank, spread_over_ranks
    from pikv_ds.adapters.hf.record import Recorder
    from pikv_ds.training.engine import Optimizing

    rate = train_config.rate_of(args.config)
    lr = _rate(args) if args.lr is not None or rate is None else rate
    config = train_config.read(args.config, Optimizing(steps=args.steps, lr=lr), dist.get_world_size(), lr_given=args.lr is not None)
    if config.base is not None and args.dtype != "float32":
        raise ConfigError(
            f"--dtype {args.dtype} beside expert_parallel in --config: under AutoEP the frozen model runs in float32; leave it out"
        )
    model = _load(args, folder)
    fingerprint = Recorder(model, _nothing()).fingerprint()  # before its weights are in pieces
    together, said = {}, ""
    if config.base is not None:
        model, together = spread_over_ranks(model, config.base), {"any_rank": any_rank}
        zero = train_config.stage_of(config.base)
        said = f"the frozen model runs under AutoEP, experts on {config.base['expert_parallel']['autoep_size']} rank(s)"
        said += ", its other weights under ZeRO-3" if zero == 3 else ""
    return Host(
        lambda tokens: Recorder(model, *tokens, **together),
        fingerprint,
        lambda loss, how: DeepSpeedTraining(loss, how, config.part),
        lr,
        said,
    )


def _megatron(args: argparse.Namespace, folder: Path) -> Host:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from transformers import AutoConfig

    from pikv_ds.adapters.hf.model_spec import read_model_spec
    from pikv_ds.launch.device import own_device
    from pikv_ds.megatron_patch import cpu_compat
    from pikv_ds.megatron_patch.hf_config import build_gpt
    from pikv_ds.megatron_patch.hf_weights import load_hf_weights
    from pikv_ds.megatron_patch.record import MegatronRecorder
    from pikv_ds.megatron_patch.train import MegatronTraining

    cpu_compat.install()
    ep = args.ranks if args.ep is None and args.tp == 1 else args.ep or 1
    parallel_state.initialize_model_parallel(args.tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1)
    model_parallel_cuda_manual_seed(args.seed)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    options = {} if torch.cuda.is_available() else cpu_compat.cpu_config_options()
    model = build_gpt(config, max_sequence_length=args.context, params_dtype=torch.float32, **options).eval()
    load_hf_weights(model, config, _load(args, folder).state_dict())
    model, layers = model.to(own_device()), read_model_spec(config)
    record = lambda tokens: MegatronRecorder(model, layers, *tokens)  # noqa: E731
    return Host(
        record,
        record(Tokens(_nothing(), None)).fingerprint(),
        lambda loss, how: MegatronTraining(loss, how, own_device()),
        _rate(args),
        f"the frozen model runs under Megatron-Core, tp {args.tp}, ep {ep}",
    )


def _nothing() -> Tensor:
    import torch

    return torch.zeros(0, 1, dtype=torch.int64)
