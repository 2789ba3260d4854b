"""Ranks as threads of one process, with a network between them in which a rank dies, or a message is lost, where a test says so.

The exchange is the cache's own but for the calls into torch.distributed: frames, turns and counters are real.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pikv_ds.errors import ConfigError, MigrationError, PeerError, UnsupportedError
from pikv_ds.exchange.exchange import Exchange

PATIENCE_S = 20.0  # longer than any simulated step takes: a wait that ends here is a hang


REFUSED = (ConfigError, UnsupportedError, MigrationError)  # all ranks raise alike, and go on


class Killed(BaseException):
    """This rank has been killed: nothing of it runs any more."""


class Hang(AssertionError):
    """Ranks wait for each other for ever."""


class Fault(NamedTuple):
    """What happens at message `message`, counted from when the network is armed; with `among`, counted among those for which that is true.

    rank: who is killed, before it has sent, or when it has; None: nobody. deaf: survivors that the message does not reach.
    """

    message: int
    rank: int | None
    sent: bool = False
    deaf: tuple[int, ...] = ()
    among: Callable[[str], bool] | None = None

    def at(self, said: Sequence[str], number: int) -> bool:
        """Whether it happens at the `number`-th of the messages `said` so far."""
        if self.among is None:
            return number == self.message
        return self.among(said[number]) and sum(map(self.among, said[:number])) == self.message


@dataclass
class Network:
    size: int
    fault: Fault | None = None
    said: list[str] = field(default_factory=list)
    """What each message since arming was for, as rank 0 or the first that sent it says."""

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._sent: dict[int, dict[int, Any]] = {}
        self._counts = [0] * self.size
        self._armed_at: int | None = None
        self.happened = False
        self.gone: set[int] = set()

    def arm(self, fault: Fault | None) -> None:
        """From the next message on. All ranks have made as many."""
        assert len(set(self._counts)) == 1, self._counts
        self.fault, self._armed_at, self.said = fault, self._counts[0], []

    def meet(self, rank: int, what: str, payload: Any) -> list[Any]:
        """The payloads of all ranks. Raises: PeerError when one will never come; Killed."""
        number = self._counts[rank]
        self._counts[rank] += 1
        fault = None
        with self._changed:
            if self._armed_at is not None:
                at = number - self._armed_at
                if at == len(self.said):
                    self.said.append(what)
                fault = self.fault if self.fault is not None and self.fault.at(self.said, at) else None
                self.happened |= fault is not None
            if fault is not None and fault.rank == rank and not fault.sent:
                self._leave(rank)
                raise Killed
            sent = self._sent.setdefault(number, {})
            sent[rank] = payload
            self._changed.notify_all()
            if fault is not None and fault.rank == rank:
                self._leave(rank)
                raise Killed
            self._wait(lambda: len(sent) == self.size or bool(self.gone - set(sent)), what)
            if len(sent) < self.size or (fault is not None and rank in fault.deaf):
                self._leave(rank)
                raise PeerError(f"rank {rank}: {what} failed: a rank is gone or its message was lost")
            return [sent[each] for each in range(self.size)]

    def leave(self, rank: int) -> None:
        with self._changed:
            self._leave(rank)

    def _leave(self, rank: int) -> None:
        self.gone.add(rank)
        self._changed.notify_all()

    def _wait(self, until: Callable[[], bool], what: str) -> None:
        if not self._changed.wait_for(until, PATIENCE_S):
            raise Hang(what)


class Seat(NamedTuple):
    """What a cache is given as its process group."""

    network: Network
    number: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.network.size


class SimulatedExchange(Exchange):
    """In place of pikv_ds.cache.cache.Exchange; `group` is a Seat."""

    def __init__(self, group: Seat, timeout_s: float, device: torch.device, told=None) -> None:
        super().__init__(None, timeout_s, device, told)
        self._deadline.timed = True  # messages may be short, as on gloo
        self.seat, self.rank, self.size = group, group.number, group.network.size

    def _meet_all(self, what: str, payload: Any) -> list[Any]:
        self.state.check(what)
        try:
            return self.seat.network.meet(self.rank, what, payload)
        except PeerError as error:
            self.state.broken = str(error)
            raise

    def all_gather(self, block: Tensor, what: str, *, read: bool = False) -> Tensor:
        self._say_first(what)
        self._count((self.size - 1) * block.nbytes)
        return torch.stack(self._meet_all(what, block.clone()))

    def all_to_all_rows(self, block, send_rows, receive_rows, what, into=None) -> Tensor:
        self._say_first(what)
        self._count(block.nbytes)
        of_ranks = self._meet_all(what, block.split(list(send_rows)))
        received = torch.cat([parts[self.rank] for parts in of_ranks])
        assert len(received) == sum(receive_rows), what
        return received if into is None else into.copy_(received)

    def all_to_all_up_to(self, messages: Tensor, sizes: list[int], what: str) -> Tensor:
        self._say_first(what)
        self._count(sum(sizes) - sizes[self.rank])
        received = torch.empty_like(messages)
        for rank, parts in enumerate(self._meet_all(what, messages.view(-1)[: sum(sizes)].split(sizes))):
            received[rank, : len(parts[self.rank])] = parts[self.rank]
        return received

    def rows(self, row: Tensor, what: str, device=None, says=None) -> list[list[int]]:
        self._count(2 * (self.size - 1) * row.nbytes)
        return [x.tolist() for x in self._meet_all(what, row.clone())]


def run_ranks(network: Network, work: Callable[[int], Any], ranks: Sequence[int] | None = None) -> list[Any]:
    """work(rank) of every rank, on threads: what each returned, or the exception that ended it. Raises: Hang."""
    ranks = range(network.size) if ranks is None else ranks
    ended: dict[int, Any] = {}

    def one(rank: int) -> None:
        try:
            ended[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 - told to the caller: it is what a rank ended with
            ended[rank] = error
            if not isinstance(error, REFUSED):
                network.leave(rank)

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE_S)
    if any(thread.is_alive() for thread in threads) or any(isinstance(one, Hang) for one in ended.values()):
        raise Hang(f"ranks {[rank for rank in ranks if rank not in ended]} did not end")
    return [ended.get(rank) for rank in ranks]
