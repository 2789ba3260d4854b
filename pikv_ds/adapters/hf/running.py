"""Which forward and which generate() of a model run in this thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor

from .cache import HFCache
from .conversation import Conversation

Growth = tuple[int, Tensor | None, list[int], Tensor]
"""What a forward adds, for Conversation.finish_forward."""


@dataclass(slots=True)
class Chunk:
    """Positions of the running forward: [B, T] int32, -1 = padding; hidden: [B, T] bool, which are; None = the host knows that none is."""

    positions: Tensor
    hidden: Tensor | None = None
    masks: dict = field(default_factory=dict)
    """Masks that are tensors, as layers have understood them (masks.py)."""


@dataclass(slots=True)
class Forward:
    """A forward through a cache. growth: what it adds, for Conversation.finish_forward; host_attention: what the model had set before."""

    cache: HFCache
    chunk: Chunk
    growth: Growth
    host_attention: str

    @property
    def conversation(self) -> Conversation:
        return self.cache.conversation


@dataclass(slots=True)
class Generation:
    """A generate(). cache: that of its main loop, once it is known."""

    cache: HFCache | None = None
    is_assistant: bool = False


class Running(threading.local):
    """Of one model, in this thread. One forward at a time: a second one that begins means that the first was interrupted."""

    def __init__(self) -> None:
        self.forward: Forward | None = None
        self.generations: list[Generation] = []
