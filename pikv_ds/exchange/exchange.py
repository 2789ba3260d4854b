"""Collectives of a step over one process group, counted and bounded in time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pikv_ds.errors import PeerError


class Exchange:
    """All communication of a cache. Owns the counters; borrows the process group (None = one rank, no communication).

    bytes_sent counts the payload that leaves this rank: (G - 1) x its block for an all-gather, the blocks of other ranks for an
    all-to-all. collectives counts calls.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.timeout_s = timeout_s
        self.collectives = 0
        self.bytes_sent = 0
        # A timed wait blocks the host; NCCL's own watchdog bounds its collectives on the device without that.
        self._timed = group is not None and dist.get_backend(group) == "gloo"

    def all_gather(self, block: Tensor, what: str) -> Tensor:
        """[...] contiguous, same shape on all ranks -> [G, ...]. `what` names the step in errors."""
        gathered = block.new_empty(self.size, *block.shape)
        self._count((self.size - 1) * block.nbytes)
        # torch 2.13 renamed all_gather_into_tensor; the old name still works but warns.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._run(what, lambda: gather(gathered.view(-1), block.view(-1), group=self.group, async_op=True))
        return gathered

    def all_to_all(self, block: Tensor, send_rows: list[int], what: str) -> Tensor:
        """Send `send_rows[r]` rows of `block` to rank r; every rank sends this rank `send_rows[self.rank]` rows.

        Args: block [sum(send_rows), ...] contiguous. Returns: [G, send_rows[rank], ...], in rank order.
        """
        mine = send_rows[self.rank]
        return self.all_to_all_rows(block, send_rows, [mine] * self.size, what).view(self.size, mine, *block.shape[1:])

    def all_to_all_rows(self, block: Tensor, send_rows: list[int], receive_rows: list[int], what: str) -> Tensor:
        """Send `send_rows[r]` rows of `block` to rank r and get `receive_rows[r]` from it: [sum(receive_rows), ...], in rank order."""
        received = block.new_empty(sum(receive_rows), *block.shape[1:])
        row_bytes = block[0].nbytes if block.shape[0] else 0
        self._count((sum(send_rows) - send_rows[self.rank]) * row_bytes)
        self._run(what, lambda: dist.all_to_all_single(received, block, receive_rows, send_rows, group=self.group, async_op=True))
        return received

    def gather_ints(self, values: list[int], device: torch.device, what: str) -> list[list[int]]:
        """Host-phase all-gather of a few integers; every rank passes the same number. Sync: reads the result back."""
        block = torch.tensor(values, dtype=torch.int64, device=device)
        return self.all_gather(block, what).tolist()

    def _count(self, num_bytes: int) -> None:
        self.collectives += 1
        self.bytes_sent += num_bytes

    def _run(self, what: str, start: Callable[[], dist.Work]) -> None:
        try:
            work = start()
            if self._timed:
                work.wait(timedelta(seconds=self.timeout_s))
            else:
                work.wait()
        except RuntimeError as error:
            raise PeerError(
                f"rank {self.rank} of {self.size}: {what} failed within pikv.timeout_s = {self.timeout_s:g} s. A rank of the group died, "
                f"raised, or runs a different number of forwards (use generate(synced_gpus=True) or .lockstep()). Cause: {error}"
            ) from error
