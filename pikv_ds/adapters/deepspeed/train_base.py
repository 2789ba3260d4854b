"""The frozen model that windows are recorded from, under AutoEP: experts over ranks, and under ZeRO-3 its other weights as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from .autoep import check_expert_parallel, expert_group_members
from .autoep_shim import registry_shim
from .shm import unlink_own_buffers


def spread_over_ranks(model: PreTrainedModel, config: Mapping[str, Any]) -> PreTrainedModel:
    """config: `base` of train_config.read. The model, to be called by all ranks together; its key projections may be in pieces now.

    Raises: as check_expert_parallel. Collective.
    """
    model.requires_grad_(False)
    check_expert_parallel(config, model)
    with registry_shim():
        engine = deepspeed.initialize(model=model, config=dict(config), dist_init_required=False)[0]
    expert_group_members(engine.module)  # that it was done: AutoEP passes over what it does not know
    dist.barrier()
    unlink_own_buffers()
    engine.eval()
    return engine.module


def any_rank(is_so: bool) -> bool:
    """Whether it is so on any rank of the job. Collective; sync."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(is_so), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
