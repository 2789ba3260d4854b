"""Which forward and which generate() of a model run in this thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.errors import UnsupportedError
from pikv_ds.staging import Arriving

from .cache import HFCache
from .conversation import Conversation
from .packed import Packed
from .plain import PlainLayers
from .prefixes import Stored

Growth = tuple[int, Tensor | None, list[int]]
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
    """A forward through a cache. growth: what it adds, for Conversation.finish_forward (None: packed says it); host_attention: what the
    model had set before; packed: how requests lie in it, where they are packed."""

    cache: HFCache
    conversation: Conversation
    core: PiKVCache
    """Of the cache, which may be asked for them once per forward: that it has not ended is checked by its layers."""
    chunk: Chunk
    growth: Growth | None
    host_attention: str
    packed: Packed | None = None
    played: bool = False
    """A graph runs it (decode_graph.py): it was planned before the model, and is finished after it, by who plays the graph."""
    windows: set[int | None] = field(default_factory=set)
    """Of the plain masks that it has asked for so far (masks.py)."""
    plain: PlainLayers | None = None
    """What attends in its layers while nothing about them is unusual; None: it is no plain decode step (plain.py)."""
    stored: Stored | None = None
    """Its tokens, where requests may begin like others (prefixes.py)."""


@dataclass(slots=True)
class Generation:
    """A generate(). cache: that of its main loop, once it is known; synced_by_us: the user has not asked for synced_gpus."""

    cache: HFCache | None = None
    is_assistant: bool = False
    synced_by_us: bool = False


class Running(threading.local):
    """Of one model, in this thread. One forward at a time: a second one that begins means that the first was interrupted."""

    def __init__(self) -> None:
        self.forward: Forward | None = None
        self.expansions: list[tuple[int, str, Tensor]] = []
        """Of the forward: layer, class, and whether a latent layer made something else of its latents than PiKV does (latent.py)."""
        self._compared: tuple[ref[Conversation], list[tuple[int, str]], Arriving] | None = None
        self.generations: list[Generation] = []

    def note_expansions(self, conversation: Conversation, *, later: bool) -> None:
        """A forward of it ends. later: what its latent layers made of their latents may be looked at before the next one, or at the end of
        a generate(), where that would keep the host waiting. Raises: as check_expansions."""
        compared, self.expansions = self.expansions, []
        if compared:
            wrong = Arriving(torch.stack([deviates for _, _, deviates in compared]))
            self._compared = ref(conversation), [(layer, name) for layer, name, _ in compared], wrong
            if wrong.on_host or not later:
                self.check_expansions()

    def check_expansions(self) -> None:
        """Raises: UnsupportedError when a layer of the last forward computed what PiKV can't absorb. Sync: waits for that forward."""
        compared, self._compared = self._compared, None
        if compared is None:
            return
        conversation, layers, wrong = compared[0](), *compared[1:]
        found = next((layer for layer, yes in zip(layers, wrong.values[0].tolist(), strict=True) if yes), None)
        if found is not None:
            if conversation is not None:
                conversation.broken = True
            raise UnsupportedError(
                f"layer {found[0]}: {found[1]} does not expand its latent as kv_b_proj(c) beside k_rot, with a linear kv_b_proj without a "
                "bias (an adapter, inputs that are quantised, or a hook?); PiKV can't absorb it: use the host's own cache"
            )
