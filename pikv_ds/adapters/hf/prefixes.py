"""Requests of a model that begin like earlier ones (storage.prefix): which tokens a conversation's rows hold, which of them stay parked.

Only what a forward of token ids alone has stored is kept: embeddings that were given, masks of another form, places of their own, gradients
and weights that have changed since make a row one that nobody may begin as.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from pikv_ds.config.storage import PrefixConfig
from pikv_ds.errors import ConfigError
from pikv_ds.prefix.log import TokenLog, Tokens
from pikv_ds.prefix.store import PrefixStore, Source

from .layer_kinds import LayerKind

PLAIN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache_position", "logits_to_keep", "use_cache", "return_dict"}
"""Arguments of a decoder besides settings: others that are tensors may change what is stored."""


class Host(Protocol):
    """Whose forwards these are (host.py)."""

    model: nn.Module
    trained: int


class Stored(NamedTuple):
    """What a forward stores, as TokenLog.add takes it. tokens: None, it is not known which."""

    tokens: Tensor | None
    mask: Tensor | None
    wrong: Tensor | None


class Prefixes:
    """Of one conversation, whose cache holds the parked rows."""

    parks = True
    alone = "pikv.storage.prefix is on"
    """Why a packed forward can't be."""

    def __init__(self, host: ref[Host], budget_tokens: int) -> None:
        """host: of the model; a conversation does not keep it alive."""
        self._host, self.store, self.log = host, PrefixStore(budget_tokens), TokenLog()
        self.num_rows = 0  # of the last forward
        self._sources: list[Tokens] | None = None  # of a generation that begins with rows that are held
        self._begins = True  # the next forward is the first of a generation
        self._mark: int | None = None

    # ---- a generation begins ---------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """The cache is empty."""
        self.store.clear()
        self.log.begin([])
        self.num_rows = 0
        self.begins()

    def begins(self) -> None:
        """The next forward is the first of a generation; the rows so far have ended."""
        self._begins, self._sources = True, None

    def find(self, ids: Tensor, mask: Tensor | None) -> tuple[int, list[Source]] | None:
        """How many columns of ids [B, T], padded on the left by mask [B, T], are held, and what each row continues; None: no row does.

        All rows reuse the same columns: as many as the row that is known least. Sync: reads both.
        """
        if ids.dim() != 2 or not self._reusable():
            return None
        given, columns = ids.tolist(), ids.shape[1]
        padding = [0] * len(given)
        if mask is not None:
            real = mask.to(torch.bool)
            if mask.shape != ids.shape or not bool(torch.equal(real.long().cummax(1).values, real.long())):
                return None  # padding on the right, or between tokens
            padding = (columns - real.sum(1)).tolist()
        self._end()
        prompts = [row[pad:] for row, pad in zip(given, padding, strict=True)]
        if not all(prompts):
            return None
        found = [self.store.find(prompt) for prompt in prompts]
        reused = min(pad + keep for pad, (_, keep) in zip(padding, found, strict=True))
        sources = [(row, reused - pad) if reused > pad else (-1, 0) for pad, (row, _) in zip(padding, found, strict=True)]
        rows = self.store.took(len(prompts), sum(map(len, prompts)), sources)
        if not any(keep for _, keep in sources):
            return None
        self._sources = rows
        return reused, sources

    def continues(self, ids: Tensor, mask: Tensor | None) -> None:
        """A generate() goes on with rows that are stored: the caller knows which, as with any cache of transformers."""

    def held(self) -> list[Tokens] | None:
        """Tokens of every row of the cache, parked ones behind the others; None: not known of all of them. Sync: reads the device."""
        rows = self.log.rows() if self._mark == weights_mark(self._host()) else None
        return None if rows is None else rows + [held.row for held in self.store.parked]

    def put(self, rows: list[Tokens] | None, num_rows: int) -> None:
        """The cache holds so many rows now, as after a forward of them; rows: their tokens, None: not known."""
        self.clear()
        self.log.begin(rows or [Tokens() for _ in range(num_rows)])
        self.log.known, self.num_rows, self._begins = rows is not None, num_rows, False
        self._mark = weights_mark(self._host())

    def plan(self, *, broken: bool) -> list[Source] | None:
        """What LocalStep.park says of the next forward. broken: an earlier one failed midway, so that nobody knows what rows hold."""
        if not self._begins:
            return None
        if broken:
            self.store.clear()
            return []
        self._end()
        return self.store.plan()

    def _end(self) -> None:
        if self.num_rows and self._mark != weights_mark(self._host()):
            self.store.void(self.num_rows)
        elif not self.store.knows_rows:
            self.store.ended(self.log.rows() or [None] * self.num_rows)

    def _reusable(self) -> bool:
        """Entries that were stored without a graph would be constants in one that is recorded now."""
        return not (torch.is_grad_enabled() and any(p.requires_grad for p in self._host().model.parameters()))

    # ---- forwards --------------------------------------------------------------------------------------------------------------

    def ran(self, num_rows: int, stored: Stored | None) -> None:
        """A forward of so many rows has run. stored: None, it has stored nothing."""
        if self._begins:
            self.store.settled()
            self.log.begin(self._sources or [Tokens() for _ in range(num_rows)])
            self._begins, self._sources = False, None
            self._mark = weights_mark(self._host())
        self.num_rows = num_rows
        if stored is not None:
            if stored.tokens is None or not self._reusable():
                self.log.known = False
            else:
                self.log.add(*stored)
        self.log.ran()

    def select(self, index: list[int]) -> None:
        if not self._begins:
            self.log.select(index)
        elif self._sources is not None:
            self._sources = [self._sources[i] for i in index]

    def cropped(self, lens: list[int]) -> None:
        if not self._begins:
            self.log.keep(lens)
        elif self._sources is not None:
            self._sources = [row.cut(n) for row, n in zip(self._sources, lens, strict=True)]

    # ---- numbers ---------------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float | int | None]:
        """Of prompts that were looked up since the cache was made; hit rate by tokens, None before the first."""
        store = self.store
        return {
            "prefix_requests": store.requests,
            "prefix_hits": store.hits,
            "prefix_tokens_looked_up": store.looked_up,
            "prefix_tokens_reused": store.reused,
            "prefix_hit_rate": store.reused / store.looked_up if store.looked_up else None,
            "prefix_tokens_parked": store.parked_tokens,
        }


def check_prefix(config: PrefixConfig, kinds: Sequence[LayerKind], model: str) -> None:
    """Raises: ConfigError for layers whose state can't go back to where a shorter request had it."""
    states = [i for i, kind in enumerate(kinds) if kind.states]
    if config.enabled and states:
        raise ConfigError(
            f"pikv.storage.prefix.enabled = true, but layer {states[0]} of {model} keeps the state of a convolution or a recurrence, which "
            f"can't go back to where a shorter request had it; leave prefix out"
        )


def stored_tokens(given: Mapping[str, object], cache_name: str) -> Tensor | None:
    """The ids of a forward, if these alone say what it stores; None: something else has a part in it."""
    mask = given.get("attention_mask")
    others = {name for name, value in given.items() if isinstance(value, Tensor) and name not in PLAIN and name != cache_name}
    plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    return given["input_ids"] if given.get("input_ids") is not None and plain and not others else None


def wrong_places(given: Mapping[str, object], positions: Tensor, hidden: Sequence[Tensor | None]) -> Tensor | None:
    """0-d bool: keys are rotated to other places than positions [B, T] (-1 = padding) of the tokens in their rows; None: they are not.

    hidden: the masks of columns so far and of new ones; without position_ids columns are places, padding among them. Sync: none.
    """
    ids = given.get("position_ids")
    if ids is None:
        return None if all(mask is None for mask in hidden) else torch.ones((), dtype=torch.bool, device=positions.device)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return torch.ones((), dtype=torch.bool, device=positions.device)
    return ((ids.to(positions.device) != positions) & (positions >= 0)).any()


def weights_mark(host: Host) -> int:
    """A number that changes when weights are written to or replaced, with a forward in train mode, other adapters, and autocast."""
    model = host.model
    weights = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
    adapters = [
        (name, str(value))
        for module in model.modules()
        for name in ("_active_adapter", "_disable_adapters", "merged_adapters")
        if (value := module.__dict__.get(name)) is not None
    ]
    kind = next(model.parameters()).device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return hash((tuple(weights), tuple(adapters), cast, host.trained))
