"""Multi-latent attention under dynamic batching: the host's static path, its rotations taken at each token's own position.

Megatron-Core serves MLA dynamically by kernels over a cache of latents of its own (cache_mla_latents). PiKV stores the latent itself, so
the path without those kernels is the right one; it differs only in where it looks up the rotations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from .attention import self_attention_class
from .base_context import PiKVContext
from .subclass import pikv_class


@pikv_class
def latent_attention_class(host: type) -> type:
    class PiKVLatentAttention(self_attention_class(host)):
        """PiKV's self-attention, which with a dynamic context has the host believe that it batches statically."""

        def forward(self, *args, inference_context=None, **kwargs):
            with _dynamic(inference_context).as_static() if _dynamic(inference_context) else contextlib.nullcontext():
                return super().forward(*args, inference_context=inference_context, **kwargs)

        def get_query_key_value_tensors(self, hidden_states: Tensor, *args, inference_context=None, **kwargs):
            context = _dynamic(inference_context)
            rows = None if context is None else context.rotary_rows(hidden_states.shape[0])
            with contextlib.nullcontext() if rows is None else rotations_at(self.rotary_pos_emb, rows):
                return super().get_query_key_value_tensors(hidden_states, *args, inference_context=inference_context, **kwargs)

    return PiKVLatentAttention


def attention_class(host: type) -> type:
    """PiKV's subclass of a self-attention of the host."""
    return latent_attention_class(host) if issubclass(host, MLASelfAttention) else self_attention_class(host)


def _dynamic(context) -> PiKVContext | None:
    return context if isinstance(context, PiKVContext) and context.dynamic else None


@contextlib.contextmanager
def rotations_at(rotary: nn.Module, rows: Tensor) -> Iterator[None]:
    """Inside, what `rotary` returns is the table at these rows [tokens], not from its beginning."""

    def take(module: nn.Module, args: tuple, output):
        if isinstance(output, tuple):  # YaRN's comes with its scale
            return output[0][rows], *output[1:]
        return output[rows]

    handle = rotary.register_forward_hook(take)
    try:
        yield
    finally:
        handle.remove()
