"""The process groups PiKV exchanges over: its own, so that its waits are bounded by its own timeout."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from pikv_ds.exchange.deadline import group_timeout


def all_ranks() -> tuple[int, ...]:
    return tuple(range(dist.get_world_size())) if dist.is_initialized() else (0,)


def own_group(members: Sequence[int], timeout_s: float) -> dist.ProcessGroup | None:
    """A new group over `members` (global ranks, ascending), or None when this rank is alone in it.

    Collective over all ranks of the job: each passes the members of its own group, and the groups of all
    ranks must be equal or disjoint.
    """
    if not dist.is_initialized():
        return None
    members_by_rank: list = [None] * dist.get_world_size()
    dist.all_gather_object(members_by_rank, tuple(members))
    mine = None
    # new_group is collective over the whole job: every rank creates every group, in the same order.
    for ranks in sorted(set(members_by_rank)):
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), timeout=group_timeout(timeout_s), backend=_backend())
            mine = group if dist.get_rank() in ranks else mine
    return mine


def _backend() -> str | None:
    """Of a group of ours: the job's, and gloo for tensors of the host where the job has NCCL alone. Frames go from host to host then."""
    return "cpu:gloo,cuda:nccl" if dist.get_backend() == "nccl" else None
