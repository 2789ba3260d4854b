"""The attention and mask functions registered with transformers under the name "pikv". B rows, T columns, H heads, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.ops import add_sink, merge_partials, sdpa_lse

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
        q, v_dim = _absorb_query(module, q), spec.v_dim
    partial = binding.core.attend(
        binding.layer, q, entry_k, entry_v, scale=scale, v_dim=v_dim, expert_ids=binding.expert_ids.of(binding.layer, entry_k)
    )
    out, lse = partial.out.transpose(1, 2), partial.lse.transpose(1, 2)
    if spec.latent:
        out = _expand_value(module, out)
    if not partial.includes_self:
        own_out, own_lse = _attend_chunk(binding, query, key, value, scale)
        out, lse = (own_out, own_lse) if partial.empty else merge_partials(torch.stack([out, own_out]), torch.stack([lse, own_lse]))
    if s_aux is not None:
        out = add_sink(out, lse, s_aux)
    return out.transpose(1, 2).to(query.dtype), None


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


def _attend_chunk(binding: Binding, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention inside the forward's own chunk, on uncompressed keys and values."""
    window, positions = binding.spec.window, binding.chunk.positions
    columns = query.shape[2]
    if binding.chunk.unpadded and (window is None or columns <= window):
        return sdpa_lse(query, key, value, scale=scale, causal=True)
    query_at, key_at = positions.unsqueeze(2), positions.unsqueeze(1)  # [B, T, 1], [B, 1, T]; -1 = padding
    visible = (key_at <= query_at) & (key_at >= 0)
    if window is not None:
        visible &= key_at > query_at - window
    return sdpa_lse(query, key, value, scale=scale, mask=visible.unsqueeze(1))


def _latent_weights(module: nn.Module) -> tuple[Tensor, Tensor]:
    """kv_b_proj as [H, nope, rank] (keys) and [H, v, rank] (values)."""
    weight = module.kv_b_proj.weight.view(module.num_heads, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)
    return weight.split([module.qk_nope_head_dim, module.v_head_dim], 1)


def _verify_latent(module: nn.Module, latent: Tensor, key: Tensor, value: Tensor) -> None:
    """Once per layer: the model's own expansion of the latent must be kv_b_proj and nothing else. Sync: "
    "one read, first forward only."""
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


def _absorb_query(module: nn.Module, q: Tensor) -> Tensor:
    """[B, T, H, nope + rope] -> [B, T, H, rank + rope], so that q . [c | k_rot] equals q . expanded key (DeepSeek-V2, section 2.1)."""
    q_nope, q_rot = q.split([module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
    return torch.cat([torch.einsum("bthd,hdr->bthr", q_nope, _latent_weights(module)[0]), q_rot], -1)


def _expand_value(module: nn.Module, out: Tensor) -> Tensor:
    """Attention over latents [B, H, T, rank] f32 -> [B, H, T, v_head_dim]."""
    return torch.einsum("bhtr,hvr->bhtv", out, _latent_weights(module)[1].to(out.dtype))
