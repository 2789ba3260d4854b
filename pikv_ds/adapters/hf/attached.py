"""What `attach` returns: the controls of an attached model, its sessions, and the cache of its newest conversation."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Protocol

from torch import Tensor

from pikv_ds.errors import ConfigError

from .cache import HFCache
from .conversation import Conversation
from .host_penalty import HostPenalty
from .session import Session, open_session


class Owner(Protocol):
    """What an AttachedCache asks of its attachment."""

    end_of_step_callbacks: list[Callable[[int], None]]
    steps: int
    penalty: HostPenalty | None
    sessions: dict[str, Session]

    @property
    def num_layers(self) -> int: ...

    def take(self) -> Conversation: ...

    def take_session(self, name: str) -> Conversation: ...

    def detach(self) -> None: ...


class AttachedCache(HFCache):
    """What `attach` returns: the controls of an attached model, and the cache of the newest conversation that was begun without one.

    Every generate() and every forward with a cache runs through PiKV while the model is attached, and one that is given no cache gets a new
    conversation, as with DynamicCache; this object then stands for that one. Passed as a cache it stays with the conversation
    that it stands for, until begin_generation(). Leaving the `with` block, or detach(), gives the model back unchanged and ends all caches.
    """

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner.take())
        self.owner = owner
        self.pinned = False  # it has been passed as a cache
        self._choice = Lock()

    def __enter__(self) -> AttachedCache:
        return self

    def __exit__(self, *exc) -> None:
        self.detach()

    def new_cache(self) -> HFCache:
        """A cache of its own for another conversation. Any number may live at once; each returns its memory when it goes."""
        return HFCache(self.owner.take())

    def session(self, name: str) -> Session:
        """That of a name, empty if it is new: a cache that generate() continues turn after turn, until it is freed.

        with cache.session("anna") as session:
            model.generate(conversation, past_key_values=session)

        On several ranks all open it with the same name; with requests of their own, those that need it.
        """
        return open_session(self.owner, name)

    @property
    def sessions(self) -> list[str]:
        """Names of those that were opened and not freed."""
        return sorted(self.owner.sessions)

    def detach(self) -> None:
        """Remove every hook and end all caches; the model is as before attach. Idempotent."""
        self.owner.detach()

    def begin_generation(self) -> None:
        """The next forward starts new requests on this rank. Others that hold the conversation so far keep it."""
        with self._choice:
            if not self.pinned and not self._unused():  # passed as a cache it is the conversation, and what forwards returned is it too
                self._follow()
            self.conversation.begin()
            self.pinned = False

    def unnamed(self, *, nested: bool) -> HFCache:
        """The cache of a forward or a generation that was given none. nested: inside a generate() of the same model."""
        with self._choice:  # two threads must not get the same one
            if nested or (self.pinned and not self._unused()):
                return HFCache.of(self.owner.take())
            if not self._unused():
                self._follow()
            return HFCache.of(self.conversation)

    def named(self) -> HFCache:
        """What stays with the conversation that this object stands for, now that it has been passed as a cache."""
        self.pinned = True
        return HFCache.of(self.conversation)

    def _unused(self) -> bool:
        """Whether the conversation is empty and nobody else has it."""
        return self.conversation.fresh and not self._shared()

    @property
    def waits(self) -> bool:
        """Whether its conversation has not begun on any rank and nobody else has it."""
        return self._unused() and not self.conversation.core.number

    def _shared(self) -> bool:
        return self.conversation.face is not None and self.conversation.face() is not None

    def _follow(self) -> None:
        """Stand for a new conversation; the one so far ends if nobody else has it."""
        idled = not self.conversation.fresh and not any(self.conversation.lens)  # it has only kept step: nobody loses a token
        if (self._shared() and not idled) or len(self.layers) != self.owner.num_layers:
            self.conversation = self.owner.take()
            self.layers = self.conversation.layers
        else:
            self.conversation.begin()

    @property
    def end_of_step_callbacks(self) -> list[Callable[[int], None]]:
        """Called after each forward through any cache of the model, with the number of forwards so far."""
        return self.owner.end_of_step_callbacks

    @property
    def steps(self) -> int:
        return self.owner.steps

    @property
    def penalty(self) -> HostPenalty | None:
        return self.owner.penalty

    def add_misses(self, layer: int, misses: Tensor) -> None:
        """Count entries of a layer that had to be fetched, per expert [E]; for routing.host_penalty. The same numbers on all ranks."""
        if self.penalty is None:
            raise ConfigError("add_misses without pikv.routing.host_penalty: nothing would read them")
        self.penalty.misses[layer] += misses.to(self.penalty.misses)
