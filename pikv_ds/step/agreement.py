"""How the ranks agree, once per forward, on whose tokens are in it. Host side; the only file that compares ranks.

A forward in steady decoding needs no collective of its own: every record carries a header, and the header of the first record of
the forward is read by all ranks. If it says that some rank does something else (a new request, several tokens, a beam fork, a crop),
all ranks see that and exchange the rows of all requests before they go on. Where the ranks can't know what the others are about to
do, a frame goes before the record and carries the header (pikv_ds/exchange/turn.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pikv_ds.errors import DivergedError, PeerError, UnsupportedError
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.exchange.wire import HEADER
from pikv_ds.staging import sent

from .step import LocalStep

PLAIN, IDLE, FRESH, ALIGNED = 1, 2, 4, 8
ANNOUNCED = 16  # and the two bits above it
DIGEST = slice(3, 5)  # of a header, the lower half first
PARK = 5  # of a header: 0 = the rank's parked rows stay, else their new number and one


class Announced(NamedTuple):
    """What a rank has said of crops before a forward."""

    hold: bool = False
    """Tokens of the forward may be taken back."""
    unsettled: bool = False
    """And those of an earlier one, which nobody has taken back or kept yet."""
    rehearsal: bool = False
    """What the forward counts stays counted when its tokens go."""

    @property
    def flags(self) -> int:
        return sum(ANNOUNCED << place for place, yes in enumerate(self) if yes)

    @classmethod
    def of(cls, header: list[int]) -> Self:
        return cls(*(bool(header[0] & ANNOUNCED << place) for place in range(3)))


NOTHING = Announced()


@dataclass(slots=True)
class Agreed:
    """One forward as all ranks see it. Per source: B, T, and per row parent (global row of the last forward or -1), keep, new tokens."""

    shapes: list[tuple[int, int]]
    parent: list[int]
    keep: list[int]
    num_new: list[int]
    restart: bool  # every request is new
    identity: bool  # rows continue themselves
    aligned: bool = False  # the tokens of every row are its first columns
    prompt: Sequence[int] = ()  # per row, tokens of its prompt, 0 = not known; empty: of no row
    parked: list[tuple[int, int]] | None = None
    """(parent, keep) of all parked rows, source after source; parents from the number of rows on are parked ones. None: they stay."""
    num_parked: list[int] | None = None
    """Of each source, with `parked`."""


class Agreement:
    """Holds the mode (replicated or distinct) and the row counts of the last forward; borrows the exchange."""

    def __init__(self, exchange: Exchange, requests: str, device: torch.device) -> None:
        self.exchange = exchange
        self.requests = requests
        self.device = device
        self.mode: str | None = None
        self.num_rows: list[int] = []  # per source
        self.lens: list[int] = []  # per global row, after the last forward
        self.num_parked: list[int] = []  # per source; empty: none
        self.parked_lens: list[int] = []  # per parked row, source after source

    @property
    def steady(self) -> bool:
        return self.mode is not None

    @property
    def own(self) -> int:
        return self.exchange.rank if self.mode == "distinct" else 0

    def known(self) -> tuple:
        """What decides how long the next records are; equal on all ranks that are in step."""
        return self.mode, self.num_rows, self.lens

    def forget(self) -> None:
        self.mode, self.num_rows, self.lens, self.num_parked, self.parked_lens = None, [], [], [], []

    def take_over(self, lens: list[int]) -> None:
        """The cache holds rows of so many tokens, the same requests on all ranks, as if they had agreed on a forward of them."""
        self.forget()
        self.mode = "local" if self.exchange.size == 1 else "replicated"
        self.num_rows, self.lens = [len(lens)], list(lens)

    def header(self, step: LocalStep, announced: Announced) -> list[int]:
        """Sync: reads a digest that lies on the device."""
        return self._header(step, announced, int(step.digest))

    def header_there(self, step: LocalStep, announced: Announced) -> Tensor:
        """The same as [HEADER] int32 on the device. Sync: none."""
        if not isinstance(step.digest, Tensor):
            return sent(self._header(step, announced, step.digest), torch.int32, self.device)
        header = sent(self._header(step, announced, 0), torch.int32, self.device)
        header[DIGEST].copy_(step.digest.view(1).view(torch.int32))
        return header

    def _header(self, step: LocalStep, announced: Announced, digest: int) -> list[int]:
        flags = PLAIN * self.is_plain(step) | IDLE * step.idle | FRESH * step.fresh | ALIGNED * step.aligned | announced.flags
        low, high = (((digest >> bits) + 2**31) % 2**32 - 2**31 for bits in (0, 32))  # the halves of an int64, as int32
        header = [flags, step.num_rows, step.num_columns, low, high, 0 if step.park is None else 1 + len(step.park)]
        return header + [0] * (HEADER - len(header))

    def is_plain(self, step: LocalStep) -> bool:
        """This rank's part of the forward fits the record that all ranks expect in steady decoding."""
        plain = step.plain_decode if self.mode == "distinct" else step.num_columns == 1 and not step.fresh
        return plain and self.steady and step.num_rows == self.num_rows[self.own] and step.park is None

    @staticmethod
    def all_plain(headers: list[list[int]]) -> bool:
        return all(h[0] & PLAIN for h in headers)

    @staticmethod
    def all_fresh(headers: list[list[int]]) -> bool:
        return all(h[0] & FRESH for h in headers)

    def check_replicated(self, headers: list[list[int]]) -> None:
        """All ranks call this with the same headers, so all of them raise or none."""
        if any(h != headers[0] for h in headers):
            raise DivergedError(
                "the ranks hold replicated requests (pikv.storage.requests), but this forward differs between them: "
                + "; ".join(f"rank {r}: {h[1]} rows x {h[2]} tokens, digest {_hex(h)}" for r, h in enumerate(headers))
                + ". Sampling with different seeds makes ranks diverge: seed them alike, or set pikv.storage.requests = 'distinct'"
            )

    def continue_plain(self, step: LocalStep, headers: list[list[int]] | None = None) -> Agreed:
        """A forward of one column that needs no message: replicated (the headers are compared), or one token per row and idle ranks."""
        shapes = [(b, 1) for b in self.num_rows]
        if self.mode != "distinct":
            return Agreed(shapes, step.parent, step.keep, step.num_new, False, step.identity, prompt=step.prompt)
        assert headers is not None, "distinct ranks are told apart by their headers"
        num_new = [0 if headers[g][0] & IDLE else 1 for g, b in enumerate(self.num_rows) for _ in range(b)]
        return Agreed(shapes, list(range(len(self.lens))), list(self.lens), num_new, False, True)

    def agree(self, step: LocalStep, headers: list[list[int]], layer0_digest: Callable[[], int]) -> Agreed:
        """Agree on a forward that is not plain. `layer0_digest()` is called on all ranks or on none. Host phase, 0 to 2 collectives."""
        restart = self.all_fresh(headers)
        if self.mode is None and not restart:
            self._refuse_to_continue(headers)
        if restart:
            self.mode = self._decide(headers, layer0_digest)
        elif self.mode == "replicated":
            self.check_replicated(headers)
        if self.mode in ("replicated", "local"):
            shapes = [(step.num_rows, step.num_columns)]
            identity, parked = step.identity and step.park is None, step.park
            num_parked = None if parked is None else [len(parked)]
            return Agreed(shapes, step.parent, step.keep, step.num_new, restart, identity, step.aligned, step.prompt, parked, num_parked)
        return self._agree_distinct(step, headers, restart)

    def _refuse_to_continue(self, headers: list[list[int]]) -> None:
        """All ranks call this with the same headers. The caches are empty, so every row must be a new request."""
        told = "; ".join(f"rank {r}: {'new requests' if h[0] & FRESH else 'goes on with earlier rows'}" for r, h in enumerate(headers))
        raise (UnsupportedError if len(headers) == 1 else PeerError)(
            f"the first forward after a reset, or of a new cache, goes on with rows that the cache does not hold ({told}); start new "
            f"requests on every rank"
        )

    def _decide(self, headers: list[list[int]], layer0_digest: Callable[[], int]) -> str:
        if self.exchange.size == 1:
            return "local"
        if self.requests == "distinct":
            return "distinct"
        if self.requests == "replicated":
            self.check_replicated(headers)
            return "replicated"
        if any(h != headers[0] for h in headers):
            return "distinct"
        keys = self._of_all([layer0_digest()], "comparing the first layer's keys")
        return "replicated" if all(k == keys[0] for k in keys) else "distinct"

    def _agree_distinct(self, step: LocalStep, headers: list[list[int]], restart: bool) -> Agreed:
        widest = max(h[1] + h[PARK] for h in headers)  # one too many where rows are parked anew
        prompt = step.prompt or [0] * step.num_rows
        new_and_prompt = [new | tokens << 32 for new, tokens in zip(step.num_new, prompt, strict=True)]  # two int32 as one number
        rows = [*zip(step.parent, step.keep, new_and_prompt, strict=True)] + [(*row, 0) for row in step.park or ()]
        rows += [(-1, 0, 0)] * (widest - len(rows))
        gathered = self._of_all([x for row in rows for x in row], "exchanging the rows of all requests")
        known = len(self.num_rows) == len(headers)
        held, parked_before = (self.num_rows if known else [0] * len(headers)), self.num_parked or [0] * len(headers)
        parent, keep, num_new, prompts, parked = [], [], [], [], []
        row0, parked0 = 0, len(self.lens)
        for header, flat, num_rows, were_parked in zip(headers, gathered, held, parked_before, strict=True):
            triples = [flat[at : at + 3] for at in range(0, len(flat), 3)]
            numbered = [-1, *range(row0, row0 + num_rows), *range(parked0, parked0 + were_parked)]  # by the rank's own number, from -1 on
            for p, n, new in triples[: header[1]]:
                parent.append(-1 if p < 0 or restart else numbered[p + 1] if known else p)
                keep.append(n)
                num_new.append(new % 2**32)
                prompts.append(new >> 32)
            if header[PARK]:
                parked.append([(numbered[p + 1], n) for p, n, _ in triples[header[1] : header[1] + header[PARK] - 1]])
            else:
                parked.append([(p, self.parked_lens[p - len(self.lens)]) for p in numbered[1 + num_rows :]])
            row0, parked0 = row0 + num_rows, parked0 + were_parked
        changed = any(h[PARK] for h in headers)
        shapes = [(h[1], h[2]) for h in headers]
        identity = not (restart or changed) and parent == list(range(len(self.lens))) and keep == self.lens
        aligned = all(h[0] & ALIGNED or h[2] == 1 for h in headers)
        flat_parked = [row for rows in parked for row in rows] if changed else None
        num_parked = [len(rows) for rows in parked] if changed else None
        return Agreed(shapes, parent, keep, num_new, restart, identity, aligned, prompts if any(prompts) else (), flat_parked, num_parked)

    def _of_all(self, values: list[int], what: str) -> list[list[int]]:
        """The integers of every rank, all of which know from the headers how many there are. Sync: reads them back."""
        return self.exchange.all_gather(torch.tensor(values, dtype=torch.int64, device=self.device), what, read=True).tolist()

    def commit(self, agreed: Agreed) -> tuple[list[int], list[int]]:
        """Take over the rows; returns the tokens of every row before and after the forward."""
        self.num_rows = [b for b, _ in agreed.shapes]
        if agreed.parked is not None:
            self.num_parked, self.parked_lens = agreed.num_parked or [], [n for _, n in agreed.parked]
        before = list(agreed.keep)
        self.lens = [n + new for n, new in zip(before, agreed.num_new, strict=True)]
        return before, list(self.lens)


def _hex(header: list[int]) -> str:
    """The digest in it."""
    low, high = (half % 2**32 for half in header[DIGEST])
    return f"{high:08x}{low:08x}"
