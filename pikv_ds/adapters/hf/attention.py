"""The attention and mask functions registered with transformers under the name "pikv". B rows, T columns, H heads, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_ds.cache.chunk import finish
from pikv_ds.cache.latent import absorb_query, expand_value
from pikv_ds.errors import UnsupportedError

from .binding import Binding, binding_of

# Arguments that models pass along to attention and that change nothing in it.
_INERT = {"use_cache", "output_hidden_states", "output_router_logits", "logits_to_keep", "position_ids", "cache_position", "is_causal"}
_INERT |= {"return_dict", "position_embeddings", "labels", "num_items_in_batch"}


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
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer over the expert-sharded cache, exact.

    query [B, Hq, T, D]; key, value [B, Hkv, T, D]: this forward's tokens only (MLA: expanded from the latent). Returns [B, T, Hq, Dv].
    """
    binding = binding_of(module)
    spec = binding.spec
    _refuse(binding, attention_mask, dropout, sliding_window, kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    entry_k, entry_v = binding.entries(key, value)
    q, v_dim = query.transpose(1, 2), value.shape[-1]
    if spec.latent:
        if binding.unverified:
            _verify_latent(module, entry_k, key, value)
            binding.unverified = False
        up_k, up_v = _latent_weights(module)
        q, v_dim = absorb_query(q, up_k), spec.v_dim
    partial = binding.core.attend(
        binding.layer, q, entry_k, entry_v, scale=scale, v_dim=v_dim, expert_ids=binding.expert_ids.of(binding.layer, entry_k)
    )
    if spec.latent:
        partial = partial._replace(out=expand_value(partial.out, up_v.to(partial.out.dtype)))
    out = finish(
        partial, query, key, value, scale=scale, window=spec.window, positions=binding.chunk.positions, hidden=binding.chunk.hidden,
        sink=s_aux,
    )  # fmt: skip
    return out.to(query.dtype), None


def pikv_mask(*args, use_vmap: bool = False, **kwargs) -> None:
    """Mask function: the cache keeps positions itself, so attention needs no mask. Custom mask overlays are refused, not dropped."""
    if use_vmap:
        raise UnsupportedError(
            "the model adds its own mask function (or_mask_function / and_mask_function) to causal attention; "
            "PiKV honours causal, sliding-window and 2-D padding masks only"
        )


def _refuse(binding: Binding, attention_mask, dropout: float, sliding_window: int | None, kwargs: dict) -> None:
    if attention_mask is not None:
        raise UnsupportedError(
            f"attention_mask of shape {tuple(attention_mask.shape)} reached attention; PiKV honours 2-D padding masks [batch, tokens] only"
        )
    if dropout:
        raise UnsupportedError(f"attention dropout {dropout} with a KV cache; call model.eval() before generating")
    if sliding_window is not None and sliding_window != binding.spec.window:
        raise UnsupportedError(
            f"layer {binding.layer} asks for sliding_window {sliding_window}, but its configuration says {binding.spec.window}"
        )
    for name, argument in kwargs.items():
        if name not in _INERT and argument is not None and argument is not False:
            raise UnsupportedError(
                f"attention argument {name!r} is set ({_brief(argument)}) and PiKV does not handle it; unset it or detach"
            )


def _brief(argument) -> str:
    return f"tensor {tuple(argument.shape)}" if isinstance(argument, Tensor) else repr(argument)


def _latent_weights(module: nn.Module) -> tuple[Tensor, Tensor]:
    """kv_b_proj as [H, nope, rank] (keys) and [H, v, rank] (values)."""
    weight = module.kv_b_proj.weight.view(module.num_heads, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)
    return weight.split([module.qk_nope_head_dim, module.v_head_dim], 1)


def _verify_latent(module: nn.Module, latent: Tensor, key: Tensor, value: Tensor) -> None:
    """Once per layer: the model's own expansion of the latent must be kv_b_proj and nothing else.

    Sync: one read, first forward only.
    """
    needed = ("kv_b_proj", "num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        raise UnsupportedError(
            f"{type(module).__name__} stores a latent but has no {', '.join(missing)}; PiKV absorbs DeepSeek-V2/V3 attention only"
        )
    w_k, w_v = (w.float() for w in _latent_weights(module))
    c, k_rot = latent[:, :1, 0].float().split([module.kv_lora_rank, module.qk_rope_head_dim], -1)
    expected_k = torch.cat([torch.einsum("btr,hdr->bhtd", c, w_k), k_rot.unsqueeze(1).expand(-1, w_k.shape[0], -1, -1)], -1)
    for name, own, expected in (("key", key, expected_k), ("value", value, torch.einsum("btr,hvr->bhtv", c, w_v))):
        got = own[:, :, :1].float()
        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=0.05, atol=0.05 * float(expected.abs().max())):
            raise UnsupportedError(
                f"{type(module).__name__} does not expand its latent {name} as kv_b_proj(c) beside k_rot; PiKV can't absorb it"
            )
