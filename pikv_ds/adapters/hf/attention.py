"""The attention function registered with transformers under the name "pikv". B rows, T columns, H heads, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import in_step, untraced

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
    spec = binding.spec
    _refuse(binding, dropout, sliding_window, softcap)
    check_arguments(module, kwargs)
    queries, columns = query.shape[2], key.shape[2]
    mask, window = own_mask(binding, attention_mask, columns, queries)
    if queries < columns:  # a layer that shares keys runs for the last tokens alone, whose logits are asked for
        query = nn.functional.pad(query, (0, 0, columns - queries, 0))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    entry_k, entry_v = binding.entries(key, value)
    if spec.latent and binding.unverified:
        _verify_latent(module, entry_k, key, value)
        binding.unverified = False
    up_k, up_v = _latent_weights(module) if spec.latent else (None, None)
    out = attention(
        binding.core, binding.layer, Inputs(query.to(entry_k.dtype), key, value, entry_k, entry_v, up_k, up_v, s_aux),
        Chunk(scale, window, binding.chunk.positions, binding.chunk.hidden, mask, softcap), binding.expert_ids.of(binding.layer, entry_k),
    )  # fmt: skip
    return out[:, -queries:].to(query.dtype), None


def _refuse(binding: Binding, dropout: float, sliding_window: int | None, softcap: float | None) -> None:
    if dropout:
        raise UnsupportedError(f"attention dropout {dropout} with a KV cache; call model.eval() before generating")
    if sliding_window is not None and sliding_window != binding.spec.window:
        raise UnsupportedError(
            f"layer {binding.layer} asks for sliding_window {sliding_window}, but its configuration says {binding.spec.window}"
        )
    if softcap != binding.spec.softcap:
        raise UnsupportedError(f"layer {binding.layer} asks for softcap {softcap}, but its configuration says {binding.spec.softcap}")


def _latent_weights(module: nn.Module) -> tuple[Tensor, Tensor]:
    """kv_b_proj as [H, nope, rank] (keys) and [H, v, rank] (values)."""
    weight = module.kv_b_proj.weight.view(module.num_heads, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)
    return weight.split([module.qk_nope_head_dim, module.v_head_dim], 1)


@in_step
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
