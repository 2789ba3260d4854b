"""The attention function registered with transformers under the name "pikv". B rows, T columns, H heads, D head_dim."""

from __future__ import annotations

from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import untraced

from .arguments import check_arguments
from .binding import Binding, binding_of
from .gradient import Chunk, Inputs, attention
from .masks import own_mask


@untraced
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
