"""What the masks and positions of a forward say: which of its columns are real tokens; and what PiKV can't honour of its arguments."""

from __future__ import annotations

import dis
import inspect

import torch
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.staging import Arriving

from .argument_names import given_cache
from .conversation import Conversation
from .masks import visible


def new_mask(cache: Conversation, mask, rows: int, columns: int) -> Tensor | None:
    """Which of the new columns hold real tokens: [B, T] bool on the host; None = all. Sync: with a mask, reads it, but for one that
    generate() has made of the last forward's.

    mask: [B, C + T], as a tokenizer makes it; or [B, 1, T, C + T], or several of these by kind of layer, of which columns that nobody sees
    are padding.
    """
    if cache.idle:
        return torch.zeros(rows, columns, dtype=torch.bool)
    if mask is None:
        if cache.column_mask is not None and not bool(cache.column_mask.all()):
            raise UnsupportedError("no attention_mask, but the cache has columns that are hidden (padding): pass the mask of all columns")
        return None
    masks = [each for each in (mask.values() if isinstance(mask, dict) else [mask]) if each is not None]
    if not all(isinstance(each, Tensor) and each.dim() in (2, 4) for each in masks):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(f"attention_mask is {shape}; PiKV honours masks [batch, tokens] and [batch, 1, tokens, tokens]")
    if not cache.fresh and len(masks) == 1 and cache.grown.shows(masks[0], cache.lens, rows, cache.columns, columns):
        new = [torch.ones(rows, columns, dtype=torch.bool)]
    else:
        new = [_padding(cache, each, rows, columns) if each.dim() == 2 else _unseen(each, rows, columns) for each in masks]
    cache.grown.meets(mask)
    if not new:
        return new_mask(cache, None, rows, columns)
    real = torch.stack(new).any(0)
    _check_holes(cache, real)
    return None if bool(real.all()) else real


def _padding(cache: Conversation, mask: Tensor, rows: int, columns: int) -> Tensor:
    if mask.shape != (rows, cache.columns + columns):
        raise UnsupportedError(
            f"attention_mask has shape {tuple(mask.shape)}; with {cache.columns} columns cached and {columns} new it must be "
            f"[{rows}, {cache.columns + columns}]"
        )
    mask, cached = mask.to(torch.bool), cache.columns
    new = mask[:, -columns:]
    if cached:
        shown, new = Arriving(mask[:, :cached].sum(1), new).values
        seen = shown.tolist()
        if seen != cache.lens:
            raise UnsupportedError(
                f"attention_mask shows {seen} cached tokens per row, the cache holds {cache.lens}: "
                "a mask can't hide or reveal cached tokens"
            )
    return new.to("cpu", torch.bool)


def _unseen(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Of a mask [B or 1, heads, T, C + T], the new columns that some query sees."""
    return visible(mask)[..., -columns:].any(2).any(1).expand(rows, -1).cpu()


def _check_holes(cache: Conversation, new: Tensor) -> None:
    """Windows count columns in transformers and tokens here: the same unless padding lies between the tokens of a row."""
    if cache.drafts or bool(new.all()) and cache.column_mask is None or all(spec.window is None for spec in cache.core.layers):
        return
    old = torch.ones(len(new), cache.columns, dtype=torch.bool) if cache.column_mask is None else cache.column_mask
    real = torch.cat([old, new], 1)
    hole = ~real & (real.cumsum(1) > 0)
    if bool((new & (hole.cumsum(1)[:, -new.shape[1] :] > 0)).any()):
        raise UnsupportedError(
            "attention_mask hides columns between the tokens of a row, and the model has layers with a sliding window, which would count "
            "them; pad rows on the left"
        )


def check_inputs(decoder: nn.Module, given: dict) -> None:
    """given: all arguments of a forward through the cache, by name. Raises: UnsupportedError."""
    if given.get("output_attentions"):
        raise UnsupportedError("output_attentions is set: attention weights are never materialised; unset it or detach")
    if given.get("encoder_hidden_states") is not None:
        raise UnsupportedError("encoder_hidden_states is set: PiKV keeps what a decoder computes of its own tokens, not an encoder's")
    if isinstance(given.get("logits_to_keep"), Tensor):  # decoders that are told run some layers for these tokens alone
        raise UnsupportedError(f"logits_to_keep of {type(decoder).__name__} is a tensor; give the number of last tokens")
    mask = given.get("attention_mask")
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    added = any(isinstance(each, Tensor) and each.dim() == 4 and not each.is_floating_point() for each in masks)
    if added and decoder.config._attn_implementation == "eager":
        raise UnsupportedError(
            f"attention_mask {tuple(masks[0].shape)} is of dtype {masks[0].dtype}, which eager attention would add to scores; give one of "
            "0 and the lowest number, or load the model with attn_implementation='sdpa'"
        )
    positions = given.get("position_ids")
    if given.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] == 1:
        return
    flash, without_cache = "flash" in str(decoder.config._attn_implementation), given_cache(given) is None
    if (flash or (without_cache and _masks_come_first(decoder))) and bool((positions.diff(dim=1) != 1).any()):
        raise UnsupportedError(
            f"position_ids restart within a row, which {type(decoder).__name__} takes for several sequences in a forward without a cache "
            "of its own; pass use_cache=False, or one sequence per row"
        )


def _masks_come_first(decoder: nn.Module) -> bool:
    """Whether a forward that is given no cache makes its masks before it has made one: only then do they show packed sequences."""
    names = [step.argval for step in dis.get_instructions(inspect.unwrap(type(decoder).forward)) if isinstance(step.argval, str)]
    made = next((at for at, name in enumerate(names) if name.startswith(("create_causal_mask", "create_sliding", "create_masks"))), None)
    caches = [at for at, name in enumerate(names) if name in ("DynamicCache", "EncoderDecoderCache")]
    return made is not None and (not caches or made < caches[0])
