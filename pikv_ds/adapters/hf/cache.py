"""The cache objects that users hold: transformers Caches over the expert-sharded store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import NoReturn, Protocol
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.stats import stats
from pikv_ds.errors import ConfigError, UnsupportedError

from .conversation import Conversation
from .host_penalty import HostPenalty
from .packed import Packed, Rows


class HFCache(Cache):
    """One conversation. Pass it as `cache` or `past_key_values` to the model that it belongs to, in generate() or in a forward.

    Its entries are dropped and their memory returned when the object goes, on close(), and when its model is detached. From then on every
    use raises UnsupportedError. It can't be copied or saved: repeat rows to fork it.
    """

    def __init__(self, conversation: Conversation) -> None:
        super().__init__(layers=conversation.layers)
        self.conversation = conversation

    @property
    def conversation(self) -> Conversation:
        return self._hold.conversation

    @conversation.setter
    def conversation(self, conversation: Conversation) -> None:
        self._hold = conversation.hold()

    @classmethod
    def of(cls, conversation: Conversation) -> HFCache:
        """The object that stands for a conversation where none was given: the same one each time, as long as somebody holds it."""
        face = None if conversation.face is None else conversation.face()
        if face is None:
            face = cls(conversation)
            conversation.face = ref(face)
        return face

    def named(self) -> HFCache:
        """What stays with this conversation."""
        return self

    @property
    def core(self) -> PiKVCache:
        return self.conversation.core

    # ---- controls ------------------------------------------------------------------------------------------------------------

    def stats(self) -> dict:
        """Plain numbers of this rank, see pikv_ds.cache.stats.stats; and probe_s, the seconds that the probe took when the model was
        attached, 0 without one. Sync: reads the device. Needs no other rank."""
        conversation = self.conversation
        numbers = stats(self.core, len(conversation.lens), conversation.columns)
        numbers |= {"state_bytes": conversation.states.nbytes, "probe_s": conversation.probe_s}
        return numbers if conversation.prefixes is None else numbers | conversation.prefixes.stats()

    def reset(self) -> None:
        """Drop all entries and return their memory. All ranks of the group must call it at the same point."""
        self.conversation.reset()

    def close(self) -> None:
        """Drop all entries for good; the object can't be used after it. All ranks of the group at the same point. Idempotent."""
        self.conversation.end("was closed")

    def begin_generation(self) -> None:
        """The next forward starts new requests on this rank."""
        self.conversation.begin()

    def reuse(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> int:
        """Begin requests [B, T], padded on the left, with what earlier ones have stored of them (storage.prefix), as generate() does.

        Returns how many columns are stored already, less than T: run the others, with the mask of all and position_ids, and without
        gradients. 0 where no row begins alike, after the first forward of a generation, and where storage.prefix is off. The same requests
        on all ranks where these are replicated. Sync: reads both where it is on.
        """
        return self.conversation.reuse(input_ids, attention_mask)

    def lockstep(self, active: bool) -> bool:
        """True while any rank of the group is active. For own loops: every rank calls it once per iteration.

        while cache.lockstep(have_work): model(**(my_inputs if have_work else cache.idle_inputs()))

        Other ranks may run generate() meanwhile; they end with such a loop as well, as they may generate again. One frame per call.
        """
        return self.conversation.lockstep.ask(active, self.conversation)

    def rebalance(
        self, holders: Sequence[Sequence[int]] | None = None, *, bytes_per_step: int | None = None, experts: bool | None = None
    ) -> bool:
        """Move shards with their entries to other ranks, between two forwards; under AutoEP the model's experts with them, in all layers.

        holders: per shard the rank [r]; None = what evens out the bytes of the ranks. bytes_per_step: None = now, else beside the forwards.
        experts: None = where they can move (AutoEP over all ranks, placement "experts"); True = an UnsupportedError says why not; False =
        entries alone. All ranks at the same point, alike. Returns whether something moves. Raises: see PiKVCache.rebalance.
        """
        return self.core.rebalance(holders, bytes_per_step=bytes_per_step, experts=experts)

    def cancel_rebalance(self) -> None:
        """A move of shards beside the forwards does not take place. All ranks at the same point."""
        self.core.cancel_rebalance()

    def idle_inputs(self) -> dict:
        """Inputs of a forward that stores nothing, changes nothing and whose output means nothing: for a rank that only keeps step."""
        conversation = self.conversation.lockstep.awaited(self.conversation)
        return {**conversation.idle_inputs(), conversation.cache_name: HFCache.of(conversation)}

    @contextmanager
    def packed(self, rows: Rows) -> Iterator[Packed]:
        """The forward inside brings requests of different lengths, one after the other in [1, N] tokens, without padding.

        rows: what each row continues, keeps and brings. A row may be new, continue another, fork one from some token on, or bring nothing;
        rows that are not named are dropped. Pass `position_ids` of what this gives and no attention_mask. Under torch.no_grad().

        with cache.packed(Rows(parent=[0, -1], keep=[7, 0], new=[1, 3])) as packed:
            model(input_ids=tokens, position_ids=packed.position_ids, past_key_values=cache)

        Raises (in the forward): UnsupportedError for models with recurrent layers, a graph, or rows that are not held.
        """
        conversation = self.conversation
        if conversation.prefixes is not None:
            raise UnsupportedError("pikv.storage.prefix is on: a packed forward names what its rows continue itself; leave prefix out")
        conversation.packed = packed = Packed(rows, conversation.core.device)
        try:
            yield packed
        finally:
            conversation.packed = None

    def expect_prompt(self, columns: int) -> None:
        """The next `columns` token columns, padding included, are one prompt, however many forwards bring them: with
        scheduling.prefill "auto" nothing of it is evicted before its end. generate() says so itself."""
        self.conversation.prompt_columns = self.conversation.columns + columns

    # ---- rows, as transformers moves them ------------------------------------------------------------------------------------

    @property
    def columns(self) -> int:
        """Token columns fed so far, padding included."""
        return self.conversation.columns

    @property
    def lens(self) -> list[int]:
        """Stored tokens per row."""
        return self.conversation.lens

    def select_rows(self, index: list[int]) -> None:
        """Row i continues row index[i]; takes effect with the next forward."""
        self.conversation.select_rows(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.conversation.select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(len(self.lens))[indices.cpu()]  # accepts a boolean mask as well
        self.conversation.select_rows(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.conversation.select_rows([i for i in range(len(self.lens)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns; a negative number, as DynamicCache takes it. crop(0) ends a speculative forward."""
        self.conversation.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Assisted decoding will crop: keep what leaves a sliding window until then."""
        self.conversation.activate_past_recording()

    def end_past_recording(self) -> None:
        self.conversation.end_past_recording()

    # ---- what it is ----------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        conversation = self.conversation
        what = conversation.ended or f"holds {len(conversation.lens)} rows x {conversation.columns} columns"
        return f"<{type(self).__name__} of {conversation.model}: {what}>"

    def __reduce_ex__(self, protocol) -> NoReturn:
        raise UnsupportedError(
            f"a PiKV cache of {self.conversation.model} can't be copied, pickled or saved: its pages lie in a store that the ranks share. "
            "To fork a conversation use batch_repeat_interleave(); to move one, run its tokens again"
        )

    def __deepcopy__(self, memo) -> NoReturn:
        self.__reduce_ex__(4)

    __copy__ = __getstate__ = lambda self: self.__reduce_ex__(4)


class Owner(Protocol):
    """What an AttachedCache asks of its attachment."""

    end_of_step_callbacks: list[Callable[[int], None]]
    steps: int
    penalty: HostPenalty | None

    @property
    def num_layers(self) -> int: ...

    def take(self) -> Conversation: ...

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
