"""Which Adam moves the weights of a part under DeepSpeed: a fused one where it is built, torch's otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from pikv_ds.ops.build.torch_builds import build_root
from pikv_ds.training.apex import find_apex
from pikv_ds.training.engine import Optimizing


class Adam(NamedTuple):
    """make: parameters -> optimizer, AdamW's update in f32. said: which, and what stood before it and why that was not taken."""

    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    said: str


def adam_of(optimizing: Optimizing, device: str, *, offload: bool = False) -> Adam:
    """device: "cpu" or "cuda", of the parameters. offload: ZeRO steps on the CPU, by DeepSpeed's CPUAdam, which it builds then.

    Nothing is compiled here but for offload: a fused optimizer that was never built is passed over, and said.
    """
    options = {"lr": optimizing.lr, "weight_decay": optimizing.weight_decay}
    if device == "cpu" or offload:
        if offload or is_built("CPUAdamBuilder"):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return Adam(lambda parameters: DeepSpeedCPUAdam(list(parameters), adamw_mode=True, **options), "CPUAdam of DeepSpeed")
        passed = "CPUAdam of DeepSpeed is not built (DS_BUILD_CPU_ADAM=1 at its installation)"
        return Adam(lambda parameters: torch.optim.AdamW(parameters, **options), f"torch AdamW; {passed}")
    if is_built("FusedAdamBuilder"):
        from deepspeed.ops.adam import FusedAdam

        return Adam(lambda parameters: FusedAdam(list(parameters), adam_w_mode=True, **options), "FusedAdam of DeepSpeed")
    passed, apex = "FusedAdam of DeepSpeed is not built (DS_BUILD_FUSED_ADAM=1 at its installation)", find_apex()
    if apex.optimizer is not None:
        return Adam(lambda parameters: apex.optimizer(list(parameters), adam_w_mode=True, **options), f"{apex.said}; {passed}")
    return Adam(lambda parameters: torch.optim.AdamW(parameters, **options), f"torch AdamW; {passed}; {apex.said}")


def is_built(builder: str) -> bool:
    """Whether DeepSpeed would load that op without compiling: built with its installation, or earlier at first use."""
    from deepspeed.git_version_info import installed_ops

    op = get_accelerator().create_op_builder(builder)
    name = getattr(op, "name", None)  # the accelerator's way to say that it has no such op: a builder without a name
    return name is not None and (installed_ops.get(name, False) or Path(build_root(), name, f"{name}.so").is_file())
