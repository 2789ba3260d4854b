"""The cache objects that users hold: transformers Caches over the expert-sharded store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.stats import stats
from pikv_ds.errors import UnsupportedError

from . import saving
from .conversation import Conversation
from .packed import Packed, Rows


class HFCache(Cache):
    """One conversation. Pass it as `cache` or `past_key_values` to the model that it belongs to, in generate() or in a forward.

    Its entries are dropped and their memory returned when the object goes, on close(), and when its model is detached. From then on every
    use raises UnsupportedError. It can't be copied or pickled: repeat rows to fork it, save() and load() to move it.
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
            raise UnsupportedError(
                f"{conversation.prefixes.alone}: a packed forward names what its rows continue itself; use a cache without it"
            )
        conversation.packed = packed = Packed(rows, conversation.core.device)
        try:
            yield packed
        finally:
            conversation.packed = None

    def save(self, path: str | Path, note: dict[str, Any] | None = None) -> int:
        """Write all rows to a file, those that are parked (storage.prefix) too, for load() on any number of ranks. All ranks at the same
        point; the first one writes. note: what JSON can say, for who loads it.

        Returns: bytes of the file. Raises, on all ranks: UnsupportedError with the reason, SessionError where it can't be written.
        """
        return saving.save(self.conversation, path, note)

    def load(self, path: str | Path) -> dict[str, Any] | None:
        """The rows of a file take the place of what the cache holds: the next forward continues them, and with storage.prefix requests that
        begin like them do. All ranks at the same point; each reads the file. Returns: the note.

        Raises, on all ranks, with the cache as before: SessionError for a file that was cut short or changed, or that is of another model,
        codec, policy, page size or number of shards; UnsupportedError with the reason.
        """
        return saving.load(self.conversation, path)

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
            "To fork a conversation use batch_repeat_interleave() or a session's fork(); to move one, save() and load()"
        )

    def __deepcopy__(self, memo) -> NoReturn:
        self.__reduce_ex__(4)

    __copy__ = __getstate__ = lambda self: self.__reduce_ex__(4)
