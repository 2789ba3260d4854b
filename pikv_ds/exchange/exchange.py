"""Collectives of a step over one process group, counted and bounded in time; and the frames that keep them from meeting others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from pikv_ds.errors import ConfigError, PeerError

from .deadline import Deadline
from .frame import ADVICE, WORDS, Frame, Kind, check, listed
from .group_state import state_of
from .turn import Told, Turn, differing

CPU = torch.device("cpu")


class Exchange:
    """All communication of a cache. Owns the counters; borrows the process group (None = one rank, no communication).

    bytes_sent counts the payload that leaves this rank: (G - 1) x its block for an all-gather, the blocks of other ranks for an
    all-to-all, 2 x (G - 1) x its row for a frame. collectives counts calls.

    Records (all-gather, all-to-all) and frames (all-reduce) never match each other: gloo keeps kinds of collectives apart.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float, device: torch.device = CPU, told: Told | None = None) -> None:
        """told: what the cache says about itself; None = there is none, and only hosts use this exchange, between forwards."""
        self.group, self.device = group, device
        # From host to host where the group can: then no rank waits for its device to say what it does.
        self._frames_on = CPU if group is not None and CPU in group._device_types else device
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.timeout_s = timeout_s
        self.collectives = 0
        self.bytes_sent = 0
        self.state = state_of(group)
        self._together = False
        self.turn = None if told is None else Turn(self.state, told)
        self._deadline = Deadline(group, timeout_s)

    # ---- records of a forward ------------------------------------------------------------------------------------------------

    def all_gather(self, block: Tensor, what: str, *, read: bool = False) -> Tensor:
        """[...] contiguous, same shape on all ranks -> [G, ...]. `what` names the step in errors. read: the caller reads it back at once;
        then the wait is bounded on every backend."""
        self._say_first(what)
        gathered = block.new_empty(self.size, *block.shape)
        self._count((self.size - 1) * block.nbytes)
        # torch 2.13 renamed all_gather_into_tensor; the old name still works but warns.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._run(what, lambda: gather(gathered.view(-1), block.view(-1), group=self.group, async_op=True), block.device, read=read)
        return gathered

    def all_to_all(self, block: Tensor, send_rows: list[int], what: str) -> Tensor:
        """Send `send_rows[r]` rows of `block` to rank r; every rank sends this rank `send_rows[self.rank]` rows.

        Args: block [sum(send_rows), ...] contiguous. Returns: [G, send_rows[rank], ...], in rank order.
        """
        mine = send_rows[self.rank]
        return self.all_to_all_rows(block, send_rows, [mine] * self.size, what).view(self.size, mine, *block.shape[1:])

    def all_to_all_rows(
        self, block: Tensor, send_rows: list[int], receive_rows: list[int], what: str, into: Tensor | None = None
    ) -> Tensor:
        """Send `send_rows[r]` rows of `block` to rank r and get `receive_rows[r]` from it: [sum(receive_rows), ...], in rank order.

        into: where to, for who must know before the others wait that there is room.
        """
        self._say_first(what)
        received = block.new_empty(sum(receive_rows), *block.shape[1:]) if into is None else into
        row_bytes = block[0].nbytes if block.shape[0] else 0
        self._count((sum(send_rows) - send_rows[self.rank]) * row_bytes)
        start = lambda: dist.all_to_all_single(received, block, receive_rows, send_rows, group=self.group, async_op=True)  # noqa: E731
        self._run(what, start, block.device)
        return received

    @property
    def short_messages(self) -> bool:
        """Whether a rank may send less than the others have room for: gloo says how long a message is, and here hosts read counts."""
        return self._deadline.timed and self.device.type == "cpu"

    def all_to_all_up_to(self, messages: Tensor, sizes: list[int], what: str) -> Tensor:
        """Messages of at most `most` bytes, whose receivers do not know how long they are.

        Args: messages uint8 [G, most] contiguous, one after another as `sizes` says; sizes[own] and, where messages can't be short, all
        are `most`. Returns: uint8 [G, most], in rank order; what is behind a message is anything.
        """
        self._say_first(what)
        most, received = messages.shape[1], torch.empty_like(messages)
        self._count(sum(sizes) - sizes[self.rank])
        block = messages.view(-1)[: sum(sizes)]
        start = lambda: dist.all_to_all_single(  # noqa: E731
            received.view(-1), block, [most] * self.size, sizes, group=self.group, async_op=True
        )
        self._run(what, start, messages.device)
        return received

    def headers(self, what: str) -> list[list[int]]:
        """The headers of all ranks at the start of a forward that all of them begin with a frame. Sync: reads the frames back."""
        assert self.turn is not None, "only a cache has headers"
        if self.turn.headers is None:
            self._say_first(what, always=True)
        assert self.turn.headers is not None, "a frame carries them"
        return self.turn.headers

    # ---- between forwards: hosts ---------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks have just met in a frame, between two forwards, and do the same now: records inside need no other frame."""
        self._together = True
        try:
            yield
        finally:
            self._together = False

    def lockstep(self, active: bool) -> bool:
        """True while any rank of the group is active; every rank calls it. One frame, whatever caches live on the group."""
        return any(went_on for went_on, _ in self.lockstep_with(active))

    def lockstep_with(self, active: bool, words: tuple[int, ...] = ()) -> list[tuple[bool, tuple[int, ...]]]:
        """The same, with up to 8 integers that need not be equal: (active, its words, then zeros) of every rank."""
        if self.size == 1:
            return [(active, words)]
        frame = Frame(kind=Kind.LOCKSTEP, what="lockstep", value=int(active), calls=self.state.calls, payload=words)
        return [(bool(said.value), said.payload) for said in self._meet(frame)]

    def gather_ints(self, values: list[int], device: torch.device, what: str) -> list[list[int]]:
        """At most 8 integers of every rank, between forwards, by way of `device`. All ranks call it with the same `what`. One frame.

        Sync: reads it back.
        """
        if self.size == 1:
            return [list(values)]
        frame = Frame(kind=Kind.MEET, what=what, value=len(values), calls=self.state.calls, payload=tuple(values))
        return [list(said.payload[: len(values)]) for said in self._meet(frame, device)]

    def meet(self, what: str, size: int = 0) -> None:
        """All ranks are here, with equal `what` and `size`; a collective of the host's own may follow. One frame."""
        if self.size > 1:
            self._meet(Frame(kind=Kind.MEET, what=what, value=size, calls=self.state.calls))

    # ---- frames --------------------------------------------------------------------------------------------------------------

    def _say_first(self, what: str, *, always: bool = False) -> None:
        """Send the frame that is due before a record, if one is.

        Raises: PeerError on all ranks when they are about to do different things; ConfigError when their caches are made differently.
        """
        if self.size == 1 or self.turn is None or self._together:
            return
        self.state.check(what)
        frame = self.turn.due(what, always=always)
        if frame is None:
            return
        frames = self._meet(frame)
        if any(said.facts != frame.facts for said in frames):
            self._compare_facts()
        self.turn.answered(frames)

    def _meet(self, frame: Frame, device: torch.device | None = None) -> list[Frame]:
        """The frames of all ranks, which say the same. Sync: reads them back."""
        rows = self.rows(torch.tensor(frame.words(), dtype=torch.int64), frame.what, device, frame.says)
        try:
            frames = self._frames(rows)
            if any(said.kind is Kind.GAVE_UP for said in frames):
                self.state.broken = f"the ranks were not in step: {listed(frames)}"
                raise PeerError(f"rank {self.rank} of {self.size}: {self.state.broken}")
            check(frames)
        except PeerError:
            self.state.holder = 0  # whatever comes next on any rank begins with a frame
            raise
        return frames

    def _frames(self, rows: list[list[int]]) -> list[Frame]:
        return [Frame.of(row, rank) for rank, row in enumerate(rows)]

    def _compare_facts(self) -> None:
        """All ranks know that their facts differ: they send them, and say which."""
        self.state.holder = 0
        assert self.turn is not None, "only a cache has facts"
        own = self.turn.facts_text
        longest = max(n for (n,) in self.gather_ints([len(own)], self.device, "comparing what the caches are made of"))
        text = torch.frombuffer(bytearray(own.ljust(longest, b" ")), dtype=torch.uint8)
        texts = [bytes(row) for row in self.rows(text, "comparing what the caches are made of")]
        unlike = differing(texts)
        more = f" ({len(unlike) - 1} more differ: {'; '.join(unlike[1:4])})" if unlike[1:] else ""
        raise ConfigError(
            f"the caches that the ranks open together are not alike: {unlike[0]}{more}. Give all ranks of a group the same 'pikv' block "
            f"and the same model"
        )

    def rows(self, row: Tensor, what: str, device: torch.device | None = None, says: str | None = None) -> list[list[int]]:
        """One row of every rank, of the same length, in an all-reduce: row [n] on the host -> G lists of n. Sync: reads it back.

        says: what the others are told when they do not answer; None = `what`.
        """
        table = row.new_zeros(self.size, row.numel())
        table[self.rank] = row
        table = table.to(device or self._frames_on)
        self._count(2 * (self.size - 1) * row.nbytes)
        self._run(what, lambda: dist.all_reduce(table, group=self.group, async_op=True), table.device, says or what, read=True)
        return table.tolist()

    # ---- calls into torch ----------------------------------------------------------------------------------------------------

    def _count(self, num_bytes: int) -> None:
        self.state.calls += 1
        self.collectives += 1
        self.bytes_sent += num_bytes

    def _run(self, what: str, start: Callable[[], dist.Work], device: torch.device, says: str | None = None, *, read: bool = False) -> None:
        self.state.check(what)
        started = time.monotonic()
        try:
            self._deadline.wait(start, device, read=read)
        except RuntimeError as error:
            says = says or (what if self.turn is None else self.turn.says(what))
            raise self._failed(what, says, time.monotonic() - started, self._deadline.bounds(device, read=read), error) from error

    def _failed(self, what: str, says: str, waited_s: float, timed: bool, error: RuntimeError) -> PeerError:
        """The group is out of step from here on. Where the others still listen, they learn what this rank was doing, and it of them."""
        said = self._last_words(says) if timed and waited_s >= self.timeout_s and self._deadline.timed_on_host else None
        late = f"within pikv.timeout_s = {self.timeout_s:g} s"
        if said is not None:
            self.state.broken = f"the ranks were not in step: {listed(said)}"
            return PeerError(f"rank {self.rank} of {self.size}: {what} failed {late}; {self.state.broken}. {ADVICE}. Cause: {error}")
        self.state.broken = f"rank {self.rank} got no answer in {says}"
        return PeerError(
            f"rank {self.rank} of {self.size}: {what} failed {late}. A rank of the group died, raised, gave up waiting, or runs "
            f"a different number of forwards (use generate(synced_gpus=True) or .lockstep()). Cause: {error}"
        )

    def _last_words(self, says: str) -> list[Frame] | None:
        """One more frame, awaited for a short while: what every rank was waiting for. None: not all answered, and the group is closed."""
        frame = Frame(kind=Kind.GAVE_UP, what=says, calls=self.state.calls)
        table = torch.zeros(self.size, WORDS, dtype=torch.int64)
        table[self.rank] = torch.tensor(frame.words(), dtype=torch.int64)
        try:
            self._deadline.wait_briefly(lambda: dist.all_reduce(table, group=self.group, async_op=True))
            return self._frames(table.tolist())
        except (RuntimeError, PeerError):
            return None
