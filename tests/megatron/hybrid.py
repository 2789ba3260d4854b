"""Tiny models of Megatron-Core whose layers are attention or experts, each a layer of its own: HybridModel, up to 0.17 MambaModel."""

from unittest import mock

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from tests.megatron.models import VOCAB, draw_weights, tiny_config

try:
    from megatron.core.models.hybrid import hybrid_block as block
    from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as Submodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel as Model
except ModuleNotFoundError:  # before 0.18
    from megatron.core.models.mamba.mamba_model import MambaModel as Model
    from megatron.core.ssm import mamba_block as block
    from megatron.core.ssm.mamba_block import MambaStack as Stack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as Submodules


def hybrid_spec() -> ModuleSpec:
    """The local GPT layer cut in two, attention and experts; and the dense MLP in place of these."""
    moe, dense = (
        get_gpt_layer_local_spec(num_experts=n, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm").submodules
        for n in (8, None)
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=moe.input_layernorm, self_attention=moe.self_attention, self_attn_bda=moe.self_attn_bda
    )
    experts, mlp = (
        TransformerLayerSubmodules(pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda)
        for layer in (moe, dense)
    )
    layers = {"attention_layer": attention, "moe_layer": experts, "mlp_layer": mlp}
    return ModuleSpec(Stack, submodules=Submodules(**{name: ModuleSpec(TransformerLayer, submodules=s) for name, s in layers.items()}))


def hybrid_model(pattern: str, spec: ModuleSpec | None = None) -> torch.nn.Module:
    """pattern: a letter for each layer, "*" attention, "E" experts, "-" a dense MLP."""
    config = tiny_config(num_layers=len(pattern), is_hybrid_model=True)
    name = "hybrid_layer_pattern" if "hybrid_layer_pattern" in Model.__init__.__annotations__ else "hybrid_override_pattern"
    torch.manual_seed(1)
    with mock.patch.object(block, "TENorm", WrappedTorchNorm):  # the norm after the last layer is Transformer Engine's in any specification
        model = Model(
            config, spec or hybrid_spec(), VOCAB, 256, position_embedding_type="rope", parallel_output=True, **{name: pattern}
        ).eval()
    draw_weights(model)
    return model
