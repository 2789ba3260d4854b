"""What this process knows about PiKV's collectives on one process group, whatever caches use it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.distributed as dist

from pikv_ds.errors import PeerError


class GroupState:
    """One per process group. calls: collectives made. caches: how many were opened, which numbers them alike on all ranks.

    holder: number of the cache whose records the ranks expect next; 0 = none: whatever comes next begins with a frame.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.caches = 0
        self.holder = 0
        self.broken: str | None = None

    def check(self, what: str) -> None:
        if self.broken is not None:
            raise PeerError(
                f"{what}: this process group cannot be used any more, because {self.broken}. End all ranks, or make another process group "
                f"on all of them (torch.distributed.new_group) and attach or build the caches with it"
            )


_states: WeakKeyDictionary[dist.ProcessGroup, GroupState] = WeakKeyDictionary()


def state_of(group: dist.ProcessGroup | None) -> GroupState:
    """The state that all users of a group share; of None, one that nobody shares."""
    return GroupState() if group is None else _states.setdefault(group, GroupState())
