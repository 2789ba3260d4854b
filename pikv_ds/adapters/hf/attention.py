"""The attention function registered with transformers under the name "pikv". B rows, T columns, H heads, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import untraced

from . import traced
from .arguments import check_arguments
from .binding import Binding, binding_of
from .gradient import Chunk, Inputs, attention
from .masks import own_mask


def pikv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer over the expert-sharded cache, exact.

    query [B, Hq, T, D]; key, value [B, Hkv, T, D]: this forward's tokens only (MLA: expanded from the latent). Returns [B, T, Hq, Dv].
    """
    if is_dynamo_compiling():
        return _when_traced(module, query, key, value, attention_mask, scaling, dropout, sliding_window, s_aux, softcap, kwargs)
    binding = binding_of(module)
    forward, spec = binding.running.forward, binding.spec
    if forward is not None and forward.plain is not None and attention_mask is None and s_aux is None and softcap is None and not dropout:
        if sliding_window is None or sliding_window == spec.window:
            at, windows = binding.at, forward.windows
            out = forward.plain.attend(module, binding.layer, at, spec.window, windows, query, key, value, scaling, kwargs)
            if out is not None:
                return out, None
    return _attention(module, query, key, value, attention_mask, scaling, dropout, sliding_window, s_aux, softcap, kwargs)


def _when_traced(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float,
    sliding_window: int | None, sink: Tensor | None, softcap: float | None, kwargs: dict,
) -> tuple[Tensor, None]:  # fmt: skip
    """One op of the graph; where one is recorded for a backward, a break in it."""
    if torch.is_grad_enabled():
        return untraced(_attention)(module, query, key, value, mask, scaling, dropout, sliding_window, sink, softcap, kwargs)
    names = [name for name, argument in kwargs.items() if argument is not None and argument is not False]
    return traced.attention(module, query, key, value, mask, scaling, dropout, sliding_window, sink, softcap, names), None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    s_aux: Tensor | None,
    softcap: float | None,
    kwargs: dict,
) -> tuple[Tensor, None]:
    binding = binding_of(module)
    spec, layer, forward = binding.spec, binding.layer, binding.forward
    conversation, core, packed, chunk = forward.conversation, forward.core, forward.packed, forward.chunk
    _refuse(binding, dropout, sliding_window, softcap)
    check_arguments(module, kwargs)
    queries, columns = query.shape[2], key.shape[2]
    mask, window = own_mask(binding, forward, attention_mask, columns, queries)
    if queries < columns:  # a layer that shares keys runs for the last tokens alone, whose logits are asked for
        query = nn.functional.pad(query, (0, 0, columns - queries, 0))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    entry_k, entry_v = binding.entries(forward.cache, core.dtype, key, value)
    up_k, up_v = binding.expansion.maps(module, binding.running, entry_k, key, value) if spec.latent else (None, None)
    asked = query if query.dtype == entry_k.dtype else query.to(entry_k.dtype)
    out = (attention if packed is None else packed.attention)(
        core, layer, Inputs(asked, key, value, entry_k, entry_v, up_k, up_v, s_aux),
        Chunk(scale, window, chunk.positions, chunk.hidden, mask, softcap), conversation.expert_ids.of(layer, entry_k),
    )  # fmt: skip
    if queries < columns:
        out = out[:, -queries:]
    return out.to(query.dtype).contiguous(), None


def _refuse(binding: Binding, dropout: float, sliding_window: int | None, softcap: float | None) -> None:
    if dropout:
        raise UnsupportedError(f"attention dropout {dropout} with a KV cache; call model.eval() before generating")
    if sliding_window is not None and sliding_window != binding.spec.window:
        raise UnsupportedError(
            f"layer {binding.layer} asks for sliding_window {sliding_window}, but its configuration says {binding.spec.window}"
        )
    if softcap != binding.spec.softcap:
        raise UnsupportedError(f"layer {binding.layer} asks for softcap {softcap}, but its configuration says {binding.spec.softcap}")


def _of_compiled(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float,
    sliding_window: int | None, sink: Tensor | None, softcap: float | None, arguments: list[str],
) -> Tensor:  # fmt: skip
    """The same for compiled layers, whose keys and values are not the tensors that update() got: those are what is stored."""
    binding = binding_of(module)
    layer = binding.forward.cache.layers[binding.at]
    if not binding.spec.latent and not binding.shares:
        brought = layer.take()
        if brought is not None and (brought[0].shape, brought[1].shape) != (key.shape, value.shape):
            raise UnsupportedError(
                f"layer {binding.layer}: the model changes keys or values between the cache and attention ({tuple(brought[0].shape)} "
                f"became {tuple(key.shape)}); PiKV attends to what is stored and can't honour that"
            )
        key, value = (key, value) if brought is None else brought
        layer.new = brought
    given = dict.fromkeys(arguments, True)
    return _attention(module, query, key, value, mask, scaling, dropout, sliding_window, sink, softcap, given)[0]


traced.answers(_of_compiled)
