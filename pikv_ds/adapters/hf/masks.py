"""Which tokens see which: the mask function registered with transformers under the name "pikv", and masks that are tensors.

The cache keeps positions itself, so causal, sliding-window and padding masks need no tensor. Any other mask is honoured among a forward's
own tokens; over what is stored it must show what the cache shows. B rows, T new columns, C cached columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from pikv_ds.errors import UnsupportedError

if TYPE_CHECKING:
    from .binding import Binding
    from .running import Forward

_NOT_MADE = object()


class _Made(threading.local):
    """Windows of the plain masks that the running forward has asked for; None = a causal one."""

    def __init__(self) -> None:
        self.windows: set[int | None] = set()


_made = _Made()


def forget_masks() -> set[int | None]:
    """A forward begins. Returns the windows of the plain masks that it asks for, as they become known."""
    _made.windows = windows = set()
    return windows


def pikv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """None for causal and sliding-window attention with padding; else [B, 1, T, C + T] bool, True = visible."""
    window = _window_of(mask_function)
    if window is not _NOT_MADE:
        _made.windows.add(window)
        return None
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def _window_of(mask_function: Callable) -> int | None | object:
    """Of masking_utils' causal and sliding-window functions; anything else is _NOT_MADE."""
    if mask_function is causal_mask_function:
        return None
    parts = _closed_over(mask_function, "and_masks.<locals>.and_mask").get("mask_functions", ())
    if len(parts) == 2 and parts[1] is causal_mask_function:
        return _closed_over(parts[0], "sliding_window_overlay.<locals>.inner_mask").get("sliding_window", _NOT_MADE)
    return _NOT_MADE


def _closed_over(function: Callable, name: str) -> dict:
    """What a function of transformers' masking_utils was made with."""
    if getattr(function, "__qualname__", "") != name or function.__module__ != causal_mask_function.__module__:
        return {}
    return {variable: cell.cell_contents for variable, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True)}


def visible(mask: Tensor) -> Tensor:
    """A mask [..., T, C + T], bool or added to scores, as bool. Sync: reads it. Raises: UnsupportedError when it adds anything else."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask != 0
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool(((mask != 0) & ~hidden).any()):
        raise UnsupportedError("attention_mask adds something else than 0 or the lowest number to scores (a bias); PiKV honours masks only")
    return ~hidden


def own_mask(binding: Binding, forward: Forward, mask: Tensor | None, columns: int, queries: int) -> tuple[Tensor | None, int | None]:
    """How the T = columns new tokens of a forward see each other: a mask [B or 1, 1, T, T] bool and a window, as for cache.chunk.finish.

    mask: what the model hands to attention, for the last `queries` of them (cache.chunk needs all: the others see nothing).
    Sync: none without a mask; with one, once per forward and kind of layer.
    Raises: UnsupportedError where stored entries are not seen as the cache shows them.
    """
    window = binding.spec.window
    if mask is None:
        return None, _window(binding, forward, columns)
    known = forward.chunk.masks
    if (id(mask), window) not in known:
        own = _checked(binding, forward, mask, columns, queries)
        known[id(mask), window] = (
            mask,
            torch.nn.functional.pad(own, (0, 0, columns - queries, 0)),
        )  # with the mask: its id is no other's as long as it is here
    return known[id(mask), window][1], None


def _window(binding: Binding, forward: Forward, columns: int) -> int | None:
    """Of a layer whose mask is plain. What the model's mask says counts, where it says it for all layers alike."""
    window, made = binding.spec.window, _made.windows
    if len(made) != 1 or window in made:
        return window
    if window is None:
        raise UnsupportedError(
            f"layer {binding.layer} attends through a sliding window of {next(iter(made))}, but its configuration has a cache of all tokens"
        )
    cached = forward.conversation.columns
    if cached and columns > 1 and cached + columns > window:
        raise UnsupportedError(
            f"layer {binding.layer} has a cache of {window} tokens and a mask without a window: what a chunk of {columns} tokens sees "
            "depends on how it is cut; give the prompt in one piece"
        )
    return None


def _checked(binding: Binding, forward: Forward, mask: Tensor, columns: int, queries: int) -> Tensor:
    """[B or 1, 1, queries, T] bool."""
    cached = forward.conversation.columns
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (queries, cached + columns):
        raise UnsupportedError(
            f"attention_mask of shape {tuple(mask.shape)} reached attention; with {cached} columns cached and {columns} new it must be "
            f"[batch, 1, {queries}, {cached + columns}], the same for all heads, or a 2-D padding mask [batch, tokens]"
        )
    seen, hidden = visible(mask), forward.chunk.hidden
    if cached:
        real = forward.conversation.column_mask
        shown = torch.ones(1, cached, dtype=torch.bool) if real is None else real
        shown = shown.to(mask.device)[:, None, None]
        if binding.spec.window is not None:
            at = torch.arange(cached + columns, device=mask.device)
            shown = shown & (at[:cached] > at[-queries:, None] - binding.spec.window)
        wrong = seen[..., :cached] != shown
        if columns == 1:  # an entry that a decode step stores is one that it sees
            wrong = wrong.any(-1, keepdim=True) | ~seen[..., cached:]
        if hidden is not None:
            wrong = wrong & ~hidden[:, None, -queries:, None]
        if bool(wrong.any()):
            raise UnsupportedError(
                f"attention_mask of shape {tuple(mask.shape)} does not show the {cached} cached columns as layer {binding.layer} keeps "
                "them: a mask can't hide or reveal cached tokens"
            )
    return seen[..., cached:]
