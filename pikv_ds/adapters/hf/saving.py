"""Save, load and fork a conversation: its rows as the cache copies them, with what transformers counts of them. B rows, C columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pikv_ds.cache import copies
from pikv_ds.cache.copies import HostPart
from pikv_ds.errors import SessionError, UnsupportedError
from pikv_ds.prefix.log import Tokens

from .conversation import Conversation
from .fingerprint import check_marks, marks_of


def save(conversation: Conversation, path: str | Path, note: dict[str, Any] | None) -> int:
    """As HFCache.save."""
    _check(conversation, "saved")
    part = _part(conversation)
    return copies.save(conversation.core, path, part._replace(about=part.about | {"note": note}))


def load(conversation: Conversation, path: str | Path) -> dict[str, Any] | None:
    """As HFCache.load."""
    _check_layers(conversation, "loaded")

    def fits(part: HostPart) -> None:
        check_marks(conversation.host(), part.tensors, part.about.get("weights"), str(path))
        if part.about["parked"] and not (conversation.prefixes is not None and conversation.prefixes.parks):
            raise SessionError(
                f"{str(path)!r} holds {part.about['parked']} parked rows, for requests that begin like them; load it into a cache with "
                f"pikv.storage.prefix enabled"
            )

    part = copies.load(conversation.core, path, fits)
    _put(conversation, part)
    return part.about["note"]


def fork(conversation: Conversation, target: Conversation) -> None:
    """target, of the same attachment and empty, holds the same rows from now on. All ranks at the same point."""
    _check(conversation, "forked")
    part = _part(conversation, marks=False)
    copies.fork(conversation.core, target.core)
    _put(target, part)


def _check_layers(conversation: Conversation, what: str) -> None:
    if conversation.states.layers:
        raise UnsupportedError(
            f"a PiKV cache of {conversation.model} can't be {what}: the state of a convolution or a recurrence stays in transformers' own "
            f"layers, which are not copied; run the tokens again"
        )


def _check(conversation: Conversation, what: str) -> None:
    conversation.check()
    _check_layers(conversation, what)
    if conversation.broken:
        raise UnsupportedError(f"this PiKV cache can't be {what}: an earlier forward failed midway; reset() it and run the tokens again")
    if conversation.touched:
        raise UnsupportedError(
            f"this PiKV cache can't be {what} now: rows were selected, repeated or cropped for the next forward; run one first"
        )


def _part(conversation: Conversation, *, marks: bool = True) -> HostPart:
    """What the host keeps of all rows. "tokens": of one row after the other, absent where they are not known."""
    tensors: dict[str, Tensor] = {}
    held = None if conversation.prefixes is None else conversation.prefixes.held()
    if held is not None:
        tensors["tokens"] = torch.tensor([token for row in held for token in row.tokens], dtype=torch.int64)
    if conversation.column_mask is not None:
        tensors["column_mask"] = conversation.column_mask.to(torch.uint8)
    parked = len(conversation.core.parked_lens)
    about = {"columns": conversation.columns, "lens": conversation.lens, "parked": parked, "model": conversation.model}
    about["held"] = None if held is None else [len(row.tokens) for row in held]
    if marks:
        of_model, about["weights"] = marks_of(conversation.host())
        tensors |= of_model
    return HostPart(tensors, about)


def _put(conversation: Conversation, part: HostPart) -> None:
    """The store holds the rows; the conversation counts them."""
    tensors, about = part
    mask = tensors["column_mask"].to(torch.bool) if "column_mask" in tensors else None
    conversation.take_over(list(about["lens"]), mask, about["columns"])
    if conversation.prefixes is not None:
        rows = None
        if about["held"] is not None:
            rows = [Tokens.alone(part.tolist()) for part in tensors["tokens"].split(about["held"])]
        conversation.prefixes.put(rows, len(about["lens"]) + about["parked"])
    if about["parked"]:
        conversation.begin()  # the rows have ended, and requests that begin like them find them
