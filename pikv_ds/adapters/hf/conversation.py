"""What one cache object stands for: the entries of a conversation (a PiKVCache), and its rows as transformers counts them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol
from weakref import finalize, ref

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.errors import UnsupportedError
from pikv_ds.prefix.log import Tokens
from pikv_ds.prefix.store import Source
from pikv_ds.step.step import LocalStep

from .anatomy import Anatomy
from .cache_layers import States, cache_layers
from .expert_ids import ExpertIds
from .fingerprint import Host
from .grown import GrownMask
from .plain import PlainLayers
from .prefixes import Stored


class InStep(Protocol):
    """What keeps the ranks in step (lockstep.py)."""

    @property
    def runs_idle(self) -> bool: ...

    def before_forward(self, conversation: Conversation) -> None: ...

    def opened(self, conversation: Conversation) -> None: ...

    def released(self, conversation: Conversation) -> None: ...

    def ask(self, active: bool, conversation: Conversation) -> bool: ...

    def awaited(self, otherwise: Conversation) -> Conversation: ...


class KnowsTokens(Protocol):
    """Which tokens the rows hold (prefixes.py, session_tokens.py)."""

    alone: str
    parks: bool

    def clear(self) -> None: ...

    def begins(self) -> None: ...

    def find(self, ids: Tensor, mask: Tensor | None) -> tuple[int, list[Source]] | None: ...

    def continues(self, ids: Tensor, mask: Tensor | None) -> None: ...

    def plan(self, *, broken: bool) -> list[Source] | None: ...

    def ran(self, num_rows: int, stored: Stored | None) -> None: ...

    def select(self, index: list[int]) -> None: ...

    def cropped(self, lens: list[int]) -> None: ...

    def held(self) -> list[Tokens] | None: ...

    def put(self, rows: list[Tokens] | None, num_rows: int) -> None: ...

    def stats(self) -> dict[str, float | int | None]: ...


class InOneRow(Protocol):
    """A forward whose rows are packed (packed.py)."""

    def plan(self, conversation: Conversation, tokens: Tensor, given: dict) -> LocalStep: ...

    def finish(self, conversation: Conversation) -> None: ...


class Hold:
    """What cache objects have of a conversation: as long as one of them lives, so does this."""

    __slots__ = ("__weakref__", "conversation")

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation


class Conversation:
    """B rows. Several cache objects may stand for one conversation. When the last of them goes, or on end(), its entries are dropped; on
    several ranks perhaps later, as others may need those (lockstep.py)."""

    def __init__(
        self,
        core: PiKVCache,
        model: str,
        expert_ids: ExpertIds,
        lockstep: InStep,
        attachment: int,
        parts: Anatomy,
        prefixes: KnowsTokens | None = None,
    ) -> None:
        """model: what the user calls it, for errors. expert_ids: where the experts of its entries come from. attachment: who made it.
        parts: of the model. prefixes: who knows the tokens of its rows, for requests that begin alike or for a session; None: nobody."""
        self.prefixes = prefixes
        self.expert_ids, self.lockstep, self.attachment = expert_ids, lockstep, attachment
        self.held_core, self.model, self.cache_name = core, model, parts.cache_name
        self._hold: ref[Hold] | None = None
        self.joined = False  # it is kept for other ranks; nobody on this one has asked for it
        self.told = False  # the other ranks hear, or have heard, that nobody holds it here
        self.ended: str | None = None
        """Why nothing more can be asked of it."""
        self.thread: int | None = None
        """Of the forward that runs through it."""
        self.generating: int | None = None
        """The thread of the generate() that it is the cache of."""
        self.drafts = False  # an assistant's: another draft than plain's is no less a draft, so what only moves a window is not refused
        self.broken = False  # a forward failed midway
        self.probe_s = 0.0
        """Seconds that the probe of its model took when it was attached."""
        self.host: Callable[[], Host | None] = lambda: None
        """Its model, as long as that has caches."""
        self.face: ref | None = None
        """The cache object that stands for it where none was given."""
        self.columns = 0  # token columns fed so far, padding included: what transformers calls the sequence length
        self._crops = ExitStack()  # holds announce_crops() of a speculative generation
        self.recording = False
        self.packed: InOneRow | None = None
        """How the tokens of the next forward lie, if its rows are packed."""
        self._plain: PlainLayers | None = None
        windows = {index: spec.window for index, spec in zip(parts.at, core.layers, strict=False)}
        self.layers = cache_layers(ref(self), parts.kinds, windows)
        self.states = States(self.layers)
        self.begin()

    @property
    def core(self) -> PiKVCache:
        self.check()
        return self.held_core

    def hold(self) -> Hold:
        """That of a cache object; all have the same."""
        hold = None if self._hold is None else self._hold()
        if hold is None:
            hold = Hold(self)
            self._hold = ref(hold)
            finalize(hold, self.lockstep.released, self).atexit = False
        return hold

    @property
    def is_held(self) -> bool:
        return self._hold is not None and self._hold() is not None

    def plain(self, local: LocalStep) -> PlainLayers | None:
        """What attends in the layers of a forward that has begun, as long as nothing about them is unusual; None: something is."""
        core = self.held_core
        steps = core.plain(local) if self.packed is None else None
        if steps is None:
            return None
        if self._plain is None or self._plain.rows != local.num_rows:
            self._plain = PlainLayers(steps, core.layers, self.layers, self.expert_ids, local.num_rows, core.dtype)
        return self._plain

    def check(self) -> None:
        """Raises: UnsupportedError once it has ended."""
        if self.ended is not None:
            raise UnsupportedError(f"this PiKV cache of {self.model} {self.ended}: its entries are gone; run the prompt again")

    def end(self, why: str) -> None:
        """Drop the entries for good. why: "was closed", completes "this cache ..."."""
        if self.ended is None:
            self.end_past_recording()
            self.held_core.reset()
            self.ended = why

    def begin(self) -> None:
        """The next forward starts new requests on this rank."""
        self.check()
        if self.prefixes is not None:
            self.prefixes.begins()
        self.columns = 0
        self.prompt_columns = 0
        """Where the prompt that is being fed ends, padding included; 0 = not known."""
        self.lens: list[int] = []  # stored tokens per row
        self.parent: list[int] = []  # pending fork: the row each row continues, in the rows of the last forward
        self.column_mask: Tensor | None = None  # [B, columns] which columns are real tokens, on the host; None = all of them
        self.grown = GrownMask()
        self.fresh = True
        self.idle = False
        self.touched = False  # parent or lens changed since the last forward
        self.end_past_recording()
        for layer in self.layers:
            layer.reset()  # what a forward that broke off left between update() and attention
        self.states.begin()

    def reset(self) -> None:
        self.core.reset()
        if self.prefixes is not None:
            self.prefixes.clear()
        self.begin()

    def reuse(self, ids: Tensor, mask: Tensor | None) -> int:
        """Begin requests ids [B, T], padded on the left by mask [B, T], with what is held of them. Sync: reads both.

        Returns: the columns that need not be run.
        """
        if self.prefixes is None or self.drafts or self.broken:
            return 0
        if not self.fresh:
            self.prefixes.continues(ids[:, : self.columns], self.column_mask)
            return 0
        found = self.prefixes.find(ids, mask)
        if found is None:
            return 0
        self.columns, sources = found
        self.parent, self.lens = [row for row, _ in sources], [keep for _, keep in sources]
        whole = all(keep == self.columns for keep in self.lens)
        self.column_mask = None if whole else mask[:, : self.columns].to("cpu", torch.bool)
        self.fresh, self.touched = False, True
        return self.columns

    def take_over(self, lens: list[int], column_mask: Tensor | None, columns: int) -> None:
        """The store holds rows of so many tokens, as after a forward of them. Arguments as the attributes of these names."""
        self.begin()
        self.lens, self.column_mask, self.columns = lens, column_mask, columns
        self.parent, self.fresh, self.broken = list(range(len(lens))), False, False

    def idle_inputs(self) -> dict:
        """Inputs, but the cache, of a forward that stores nothing, changes nothing and whose output means nothing."""
        rows = max(len(self.lens), 1)
        mask = torch.ones(rows, self.columns, dtype=torch.bool) if self.column_mask is None else self.column_mask
        device = self.core.device
        return {
            "input_ids": torch.zeros(rows, 1, dtype=torch.int64, device=device),
            "attention_mask": torch.nn.functional.pad(mask, (0, 1)).to(device),
            "position_ids": torch.zeros(rows, 1, dtype=torch.int64, device=device),
        }

    # ---- rows, as transformers moves them ------------------------------------------------------------------------------------

    def select_rows(self, index: list[int]) -> None:
        """Row i continues row index[i]; takes effect with the next forward."""
        self.check()
        if self.fresh:
            return
        self.states.select(index)
        self.touched = self.touched or index != list(range(len(self.parent)))
        if self.prefixes is not None:
            self.prefixes.select(index)
        self.parent = [self.parent[i] for i in index]
        self.lens = [self.lens[i] for i in index]
        self.column_mask = None if self.column_mask is None else self.column_mask[index]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns; a negative number, as DynamicCache takes it. crop(0) ends a speculative forward."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of columns to remove as a negative integer")
        core, remove = self.core, min(-tokens_to_remove, self.columns)
        self.states.take_back(remove)
        if remove:
            real = [remove] * len(self.lens)
            if self.column_mask is not None:
                real = self.column_mask[:, self.columns - remove :].sum(1).tolist()
                self.column_mask = self.column_mask[:, : self.columns - remove]
            self.lens = [n - r for n, r in zip(self.lens, real, strict=True)]
            self.columns -= remove
            self.touched = self.touched or any(real)
            if self.prefixes is not None:
                self.prefixes.cropped(self.lens)
        core.note_crop()

    def activate_past_recording(self) -> None:
        """Assisted decoding will crop: keep what leaves a sliding window until then. Once is enough."""
        if not self.recording:
            # A draft is many forwards and then one crop; what it looked at may stay counted, as it only proposes.
            self._crops.enter_context(self.core.announce_crops(rehearsal=self.drafts))
            self.states.record()
            self.recording = True

    def end_past_recording(self) -> None:
        self._crops.close()
        self.states.stop_recording()
        self.recording = False

    def finish_forward(self, num_columns: int, new_mask: Tensor | None, num_new: list[int], *, kept_step: bool) -> None:
        """Account for a forward that has run: B rows grew by num_columns columns, num_new of them real per row (mask None: all).

        kept_step: it was run for other ranks and leaves the rows as they were.
        """
        if self.fresh:
            self.lens, self.column_mask = [0] * len(num_new), None
        self.parent = list(range(len(num_new)))
        self.fresh = self.touched = False
        if not kept_step:
            if new_mask is not None or self.column_mask is not None:
                old = torch.ones(len(num_new), self.columns, dtype=torch.bool) if self.column_mask is None else self.column_mask
                new = torch.ones(len(num_new), num_columns, dtype=torch.bool) if new_mask is None else new_mask
                self.column_mask = torch.cat([old, new], 1)
            self.lens = [n + new for n, new in zip(self.lens, num_new, strict=True)]
            self.columns += num_columns
            self.grown.ran(self.lens)
