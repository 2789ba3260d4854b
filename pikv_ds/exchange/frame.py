"""A frame: what a rank says before it does something that the others may not expect. Fixed size, so frames always meet frames."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from pikv_ds.errors import PeerError

MAGIC = 0x50694B5601  # the last byte is the version of this layout
PAYLOAD = 8  # integers that ride along: the header of a forward, or what a host gathers
TEXT = 12  # words of text, 8 bytes each
FIELDS = ("cache", "forward", "place", "value", "facts", "state", "calls")
WORDS = 2 + len(FIELDS) + PAYLOAD + TEXT


class Kind(IntEnum):
    OPEN = 1  # the first forward of a cache, or the first after its reset
    FORWARD = 2  # a forward that does not simply follow the last one of the same cache
    LOCKSTEP = 3  # whether a rank goes on
    MEET = 4  # anything else that all ranks do together
    GAVE_UP = 5  # the collective before this one was not answered


# What must be equal on all ranks, by kind; facts are compared apart, by name.
COMPARED = {
    Kind.OPEN: ("cache", "place", "value", "state", "calls"),
    Kind.FORWARD: ("cache", "forward", "place", "value", "state", "calls"),
    Kind.LOCKSTEP: ("calls",),
    Kind.MEET: ("what", "value", "calls"),
}
IN_WORDS = {
    "place": "the layers that have run",
    "value": "whether the forward before broke off",
    "state": "the rows that their caches hold, or the shapes of queries",
    "calls": "the number of collectives so far",
}
ADVICE = (
    "All ranks of a group must make the same calls in the same order: open caches, run forwards (idle ones where a rank has nothing to "
    "do), lockstep and reset alike"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One rank's row of WORDS int64.

    cache: number on its group, 0 = not opened before. forward: of that cache. place: layers of it that have run. value: of a forward,
    1 = the one before broke off; of a lockstep, whether the rank is active; of a meeting, a size. facts, state: digests of what the
    cache is made of and of what it holds. calls: collectives that the rank has made on the group. what: at most 96 bytes are sent.
    """

    kind: Kind
    what: str
    cache: int = 0
    forward: int = 0
    place: int = 0
    value: int = 0
    facts: int = 0
    state: int = 0
    calls: int = 0
    payload: tuple[int, ...] = ()

    def words(self) -> list[int]:
        assert len(self.payload) <= PAYLOAD, f"{len(self.payload)} integers in a frame that takes {PAYLOAD}"
        text = self.what.encode()[: TEXT * 8].ljust(TEXT * 8, b"\0")
        words = [int.from_bytes(text[i : i + 8], "little", signed=True) for i in range(0, TEXT * 8, 8)]
        fields = [getattr(self, name) for name in FIELDS]
        return [MAGIC, self.kind, *fields, *self.payload, *[0] * (PAYLOAD - len(self.payload)), *words]

    @classmethod
    def of(cls, words: list[int], rank: int) -> Frame:
        """Raises: PeerError where the row is none of ours: a collective of somebody else on this group, or another version."""
        if words[0] != MAGIC:
            raise PeerError(
                f"rank {rank} has sent something else than a frame of this version of pikv_ds: install the same version on all ranks, and "
                f"use no collective of your own on PiKV's process group while a forward may run"
            )
        end = 2 + len(FIELDS)
        text = b"".join(word.to_bytes(8, "little", signed=True) for word in words[end + PAYLOAD :])
        return cls(
            kind=Kind(words[1]),
            what=text.rstrip(b"\0").decode(errors="replace"),
            payload=tuple(words[end : end + PAYLOAD]),
            **dict(zip(FIELDS, words[2:end], strict=True)),
        )

    @property
    def says(self) -> str:
        if self.kind is Kind.LOCKSTEP:
            return "lockstep, " + ("active" if self.value else "not active")
        if self.kind in (Kind.MEET, Kind.GAVE_UP):
            return self.what
        if not self.cache:
            return f"the first forward of a new cache ({self.what})"
        if self.kind is Kind.OPEN:
            return f"the first forward of cache {self.cache} after its reset ({self.what})"
        broken = ", after one that broke off" if self.value else ""
        return f"forward {self.forward} of cache {self.cache}{broken} ({self.what})"


def listed(frames: list[Frame]) -> str:
    """What every rank said, for an error."""
    gave_up = "gave up waiting for the others in "
    return "; ".join(f"rank {r}: {gave_up * (frame.kind is Kind.GAVE_UP)}{frame.says}" for r, frame in enumerate(frames))


def check(frames: list[Frame]) -> None:
    """All ranks call this with the same frames, so all raise or none. Raises: PeerError naming what each rank was about to do."""
    first = frames[0]
    if any(frame.kind is not first.kind for frame in frames):
        raise PeerError(f"the ranks are not about to do the same: {listed(frames)}. {ADVICE}")
    unlike = [name for name in COMPARED[first.kind] if any(getattr(frame, name) != getattr(first, name) for frame in frames)]
    if unlike:
        told = ", ".join(f"{IN_WORDS[name]} ({_values(name, frames)})" for name in unlike if name in IN_WORDS)
        raise PeerError(f"the ranks are not about to do the same: {listed(frames)}{'; they differ in ' * bool(told)}{told}. {ADVICE}")


def _values(name: str, frames: list[Frame]) -> str:
    if name == "state":
        return "compared by a digest"
    return ", ".join(str(bool(v) if name == "value" else v) for v in (getattr(frame, name) for frame in frames))
