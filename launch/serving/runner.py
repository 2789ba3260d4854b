"""What runs a model for a service: one packed forward per step over this rank's requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Piece(NamedTuple):
    """Tokens of one request in a step. start: of its tokens, how many are stored before; they may be another request's (source)."""

    number: int
    tokens: list[int]
    start: int
    source: int
    """The request whose first `start` tokens it takes over; -1: it continues itself, or begins."""
    all_logits: bool
    """Logits of every token, else of the last."""
    prompt: int = 0
    """Tokens of its prompt."""


class Runner(Protocol):
    """A loaded model and its cache on one rank."""

    tokenizer: Any
    device: torch.device
    eos: frozenset[int]
    vocabulary: int
    """Token ids that the model knows."""
    data_rank: int
    """Tensor-parallel peers run the same requests, and have the same."""
    speaks: bool
    """The first of these peers: what it has to say is what the others would."""
    shares_prefixes: str | None
    """Why no request may take over another's entries; None: it may."""

    def step(self, pieces: Sequence[Piece], drop: Sequence[int]) -> dict[int, Tensor]:
        """Forget the requests in `drop`, then run a forward; all ranks call it together. Returns logits [n, V] f32 by request.

        Requests that are neither dropped nor in `pieces` stay as they are.
        """

    def stats(self) -> dict[str, Any]:
        """Plain numbers of this rank's cache, see pikv_ds.cache.stats.stats. Sync: reads the device."""

    def close(self) -> None: ...


def eos_of(generation_config: Any) -> frozenset[int]:
    """Tokens that end a text."""
    found = generation_config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or ())
