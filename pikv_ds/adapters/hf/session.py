"""Sessions: caches with a name, in which chat turns continue what is stored. An attachment keeps them until they are freed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pikv_ds.errors import UnsupportedError
from pikv_ds.prefix.index import common

from . import saving
from .cache import HFCache
from .conversation import Conversation


class Owner(Protocol):
    """The attachment (attachment.py)."""

    sessions: dict[str, Session]

    def take_session(self, name: str) -> Conversation: ...


class Session(HFCache):
    """A cache to pass as `past_key_values`, as any of new_cache(); generate() of the whole conversation runs only what is new in it.

    Unlike those it checks that the conversation begins with the tokens that it holds, and lives until close() or the end of the `with`
    block. After eviction and compression it continues from what is stored, as one long-lived cache would.
    """

    def __init__(self, name: str, owner: Owner) -> None:
        super().__init__(owner.take_session(name))
        self.name, self._owner, self._freed = name, owner, False
        self._said: Tensor | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    @property
    def conversation(self) -> Conversation:
        if self._freed:
            raise UnsupportedError(f"session {self.name!r} was freed; cache.session({self.name!r}) begins a new one of that name")
        return self._hold.conversation

    @conversation.setter
    def conversation(self, conversation: Conversation) -> None:
        self._freed, self._hold = False, conversation.hold()

    @property
    def tokens(self) -> list[list[int]] | None:
        """Of every row, what is stored; None: not known, as not everything came as token ids. Sync: reads the device."""
        held = self.conversation.prefixes.held()
        return None if held is None else [row.tokens for row in held]

    @torch.no_grad()
    def generate(self, input_ids: Tensor | Sequence[int], **options) -> Tensor:
        """model.generate() of what was said so far and then input_ids [B, T] or one row of ids: a turn, a tool's result.

        Returns the whole conversation [B, C + T + new]. options: as model.generate() takes them, without a cache. Rows that end at
        different tokens are padded by generate(); give whole conversations with their masks to model.generate() then.
        """
        model = self.conversation.host().model
        new = torch.as_tensor(input_ids, dtype=torch.int64, device=model.device)
        new = new.unsqueeze(0) if new.dim() == 1 else new
        said = self._so_far()
        ids = new if said is None else torch.cat([said.to(new.device), new], 1)
        given = {"attention_mask": torch.ones_like(ids), **options, "past_key_values": self, "return_dict_in_generate": False}
        self._said = model.generate(ids, **given)
        return self._said

    @property
    def said_columns(self) -> int:
        """Columns of the conversation that the next generate() adds to: what is stored, and a last token that has not been run."""
        said = self._so_far()
        return 0 if said is None else said.shape[1]

    def _so_far(self) -> Tensor | None:
        """[B, C] tokens; the last one that was generated has not been run yet."""
        if self._said is not None and self._said.shape[1] >= self.columns:
            return self._said
        if not self.columns:
            return None
        tokens = self.tokens
        if tokens is None or self.conversation.column_mask is not None:
            raise UnsupportedError(
                f"session {self.name!r} does not know all tokens that it holds (padding, or inputs other than token ids); call "
                f"model.generate(whole_conversation, past_key_values=session)"
            )
        return torch.tensor(tokens, dtype=torch.int64)

    def rewind(self, input_ids: Tensor) -> int:
        """Forget what differs from input_ids [1, T], a conversation that goes on otherwise. Returns how many tokens stay.

        Takes effect with the next forward, which refuses what can't be taken back: tokens behind an eviction or a window.
        """
        tokens, given = self.tokens, input_ids[0].tolist()
        if tokens is None or len(tokens) != 1 or self.conversation.column_mask is not None:
            raise UnsupportedError(f"session {self.name!r}: rewind() takes one row without padding whose tokens are known")
        held = tokens[0]
        same = min(common(held, given), len(given) - 1)  # the last one runs, as its logits are asked for
        if same < len(held):
            self.crop(same - len(held))
        self._said = None
        return same

    def fork(self, name: str) -> Session:
        """Another session that holds the same rows, in pages of its own. All ranks at the same point, between forwards.

        Raises: UnsupportedError where the name is taken, and as HFCache.save.
        """
        if name in self._owner.sessions:
            raise UnsupportedError(f"session {name!r} exists already; close it, or give the fork of {self.name!r} another name")
        made = open_session(self._owner, name)
        try:
            saving.fork(self.conversation, made.conversation)
        except BaseException:
            made.close()
            raise
        made._said = None if self._said is None else self._said.clone()
        return made

    def save(self, path: str | Path, note: dict[str, Any] | None = None) -> int:
        """As HFCache.save; with what generate() has said, whose last token has not been run."""
        said = None if self._said is None else self._said.tolist()
        return super().save(path, {"said": said, "note": note})

    def load(self, path: str | Path) -> dict[str, Any] | None:
        saved = super().load(path) or {}
        if saved.keys() != {"said", "note"}:  # of a cache without a name
            self._said = None
            return saved or None
        self._said = None if saved["said"] is None else torch.tensor(saved["said"], dtype=torch.int64)
        return saved["note"]

    def reset(self) -> None:
        super().reset()
        self._said = None

    def begin_generation(self) -> None:
        super().begin_generation()
        self._said = None

    def close(self) -> None:
        """Free it: its entries go now, with requests of their own on several ranks once no rank holds it. Idempotent."""
        if self._freed:
            return
        conversation, self._said = self.conversation, None
        self._owner.sessions.pop(self.name, None)
        if conversation.core.replicated is False and conversation.core.ranks.size > 1:
            self._freed, self._hold = True, None
            return
        conversation.end("was closed")
        self._freed = True

    def __repr__(self) -> str:
        return f"<Session {self.name!r}: freed>" if self._freed else f"<Session {self.name!r}: {super().__repr__()}>"


def open_session(owner: Owner, name: str) -> Session:
    """That of a name, or a new one."""
    if name not in owner.sessions:
        owner.sessions[name] = Session(name, owner)
    return owner.sessions[name]
