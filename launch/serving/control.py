"""Rank 0 tells every rank what to do next, and hears what came of it: one broadcast and one gather per step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Control:
    """Over a gloo group of its own, so that no message of a cache meets one of these. One rank: no communication."""

    def __init__(self, timeout_s: float) -> None:
        """Collective. timeout_s: how long a rank waits for rank 0, which says something at least every few seconds, and rank 0 for it."""
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.group = None
        if self.size > 1:
            self.group = dist.new_group(list(range(self.size)), timeout=timedelta(seconds=timeout_s), backend="gloo")

    def tell(self, plan: Any) -> None:
        """A Plan; what a chat tells its ranks (launch/chat)."""
        if self.group is not None:
            dist.broadcast_object_list([plan], 0, group=self.group)

    def listen(self) -> Any:
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, 0, group=self.group)
        return heard[0]

    def collect(self, own: Any) -> list[Any]:
        """Of all ranks, in their order; on rank 0."""
        if self.group is None:
            return [own]
        answers: list[Any] = [None] * self.size
        dist.gather_object(own, answers, 0, group=self.group)
        return answers

    def answer(self, own: Any) -> None:
        dist.gather_object(own, None, 0, group=self.group)
