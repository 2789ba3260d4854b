"""What PiKV adds to the host's self-attention and to its core attention, as subclasses of their own classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError

from .base_context import PiKVContext
from .layers import is_latent
from .link import Link
from .subclass import pikv_class, put_on


@pikv_class
def core_attention_class(host: type) -> type:
    class PiKVCoreAttention(host):
        """Attends over the store when the layer was called with a PiKV context; otherwise it is the host's core attention."""

        pikv_attend: Callable | None = None  # (query, key, value, mask) -> out, for the running forward

        def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args, **kwargs):
            if self.pikv_attend is None:
                return super().forward(query, key, value, attention_mask, *args, **kwargs)
            attend, self.pikv_attend = self.pikv_attend, None
            for name in ("attention_bias", "packed_seq_params"):
                if kwargs.get(name) is not None:
                    raise UnsupportedError(
                        f"layer {self.layer_number}: {name} is set with a PiKV context; PiKV honours causal and sliding-window masks only"
                    )
            return attend(query, key, value, attention_mask).flatten(2)

    return PiKVCoreAttention


@pikv_class
def self_attention_class(host: type) -> type:
    class PiKVSelfAttention(host):
        """Rotates keys before they are stored, as a sharded entry must carry its own position, and hands them to the core attention.

        For MLA, whose keys arrive rotated, it also hands over the latent.
        """

        pikv_config = None
        pikv_link: Link | None = None
        pikv_hidden: Tensor | None = None  # of the running forward: what the layer's router would say now (expert_ids "lookahead")
        pikv_latent: Tensor | None = None  # of the running forward: the normalised latent of MLA

        def __init__(self, *args, pikv_config, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.pikv_config = pikv_config
            put_on(self.core_attention, core_attention_class)

        def get_query_key_value_tensors(self, hidden_states: Tensor, *args, **kwargs):
            found = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
            if not self.training and self.pikv_link is not None:
                self.pikv_hidden = hidden_states.detach()
                self.pikv_latent = found[4].detach() if is_latent(self) else None  # of q, k, v, compressed q, compressed kv
            return found

        def _adjust_key_value_for_inference(
            self, inference_context, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb, *args, inference_params=None, **kwargs
        ):
            context, joins = _running_context(self, inference_context if inference_context is not None else inference_params)
            hidden, self.pikv_hidden = self.pikv_hidden, None
            latent, self.pikv_latent = self.pikv_latent, None
            if context is None:
                return super()._adjust_key_value_for_inference(None, query, key, value, rotary_pos_emb, *args, **kwargs)
            rows = None if joins else context.rotary_rows(key.shape[0])
            if rotary_pos_emb is not None and rows is not None:
                query, key = (self._rotate(t, table[rows]) for t, table in zip((query, key), rotary_pos_emb, strict=True))
            router = self.pikv_link.router
            looked_ahead = router.look_ahead(hidden) if router is not None and context.expert_ids.source == "lookahead" else None
            self.core_attention.pikv_attend = partial(
                context.attend, self.layer_number, latent=latent, looked_ahead=looked_ahead, idle=joins
            )
            # No rotary embedding is returned: the host would rotate again.
            return query, key, value, None, AttnMaskType.no_mask, None

        def flash_decode_and_prefill(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
            """Dynamic batching calls this in place of the core attention. Returns [N, 1, Hq, D]."""
            attend, self.core_attention.pikv_attend = self.core_attention.pikv_attend, None
            return attend(query, key, value, None)

        def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
            mscale = _yarn_get_concentration_factor_from_config(self.config)
            return apply_rotary_pos_emb(x, angles, config=self.config, mscale=mscale, cp_group=self.pg_collection.cp)

    return PiKVSelfAttention


def _running_context(attention: nn.Module, given) -> tuple[PiKVContext | None, bool]:
    """The context of this forward, and whether it is a dummy forward that only joins the others."""
    attention.core_attention.pikv_attend = None  # a forward that failed between the two must not reach into this one
    link = attention.pikv_link
    joins = given is None and not attention.training and link is not None and link.serving is not None
    context = link.serving if joins else given
    if link is not None:
        link.context = context
    if context is None:
        return None, False
    if not isinstance(context, PiKVContext):
        raise UnsupportedError(
            f"the model is enabled for PiKV but was called with a {type(context).__name__}, which keeps a dense cache; pass a "
            f"PiKVInferenceContext (StaticInferenceEngine needs legacy=True, or it replaces the context) or, for dynamic batching, a "
            f"PiKVDynamicInferenceContext, or call disable_pikv(model)"
        )
    if attention.training:
        raise UnsupportedError(f"a {type(context).__name__} was passed to a model in train mode; call model.eval() first")
    return context, joins
