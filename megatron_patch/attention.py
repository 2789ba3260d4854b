"""What PiKV adds to the host's SelfAttention and to its core attention, as subclasses of their own classes."""

from __future__ import annotations

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from pikv_ds.errors import UnsupportedError

from .context import PiKVInferenceContext
from .layers import Link
from .subclass import pikv_class, put_on


@pikv_class
def core_attention_class(host: type) -> type:
    class PiKVCoreAttention(host):
        """Attends over the store when the layer was called with a PiKV context; otherwise it is the host's core attention."""

        pikv_call: tuple[PiKVInferenceContext, int] | None = None  # context and layer_number of the running forward

        def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args, **kwargs):
            if self.pikv_call is None:
                return super().forward(query, key, value, attention_mask, *args, **kwargs)
            (context, layer_number), self.pikv_call = self.pikv_call, None
            for name in ("attention_bias", "packed_seq_params"):
                if kwargs.get(name) is not None:
                    raise UnsupportedError(f"layer {layer_number}: {name} is set with a PiKV context; PiKV honours causal and sliding-window attention only")
            return context.attend(layer_number, query, key, value, attention_mask)

    return PiKVCoreAttention


@pikv_class
def self_attention_class(host: type) -> type:
    class PiKVSelfAttention(host):
        """Rotates keys before they are stored, as a sharded entry must carry its own position, and hands them to the core attention."""

        pikv_config = None
        pikv_link: Link | None = None

        def __init__(self, *args, pikv_config, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.pikv_config = pikv_config
            put_on(self.core_attention, core_attention_class)

        def _adjust_key_value_for_inference(
            self, inference_context, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb, *args, inference_params=None, **kwargs
        ):
            context = inference_context if inference_context is not None else inference_params
            self.core_attention.pikv_call = None  # a forward that failed between the two must not reach into this one
            if self.pikv_link is not None:
                self.pikv_link.context = context
            if context is None:
                return super()._adjust_key_value_for_inference(None, query, key, value, rotary_pos_emb, *args, **kwargs)
            if not isinstance(context, PiKVInferenceContext):
                raise UnsupportedError(
                    f"the model is enabled for PiKV but was called with a {type(context).__name__}, which keeps a dense cache; pass a PiKVInferenceContext "
                    f"(static batching; StaticInferenceEngine needs legacy=True, or it replaces the context), or call disable_pikv(model)"
                )
            if self.training:
                raise UnsupportedError("a PiKVInferenceContext was passed to a model in train mode; call model.eval() first")
            if rotary_pos_emb is not None:
                start, stop = context.rotary_range(key.shape[0])
                query, key = (self._rotate(t, table[start:stop]) for t, table in zip((query, key), rotary_pos_emb, strict=True))
            self.core_attention.pikv_call = (context, self.layer_number)
            # No rotary embedding is returned: the host would rotate again.
            return query, key, value, None, AttnMaskType.no_mask, None

        def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
            mscale = _yarn_get_concentration_factor_from_config(self.config)
            return apply_rotary_pos_emb(x, angles, config=self.config, mscale=mscale, cp_group=self.pg_collection.cp)

    return PiKVSelfAttention
