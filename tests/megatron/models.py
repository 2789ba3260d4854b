"""Tiny GPT models of Megatron-Core on CPU, and the process groups they need. Jobs and in-process tests share them."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from pikv_ds.megatron_patch.cpu_compat import cpu_config_options
from pikv_ds.megatron_patch.local_layers import LatentCoreAttention

VOCAB = 128
SHAPE = dict(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=96,
    moe_ffn_hidden_size=32,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="alltoall",
    add_bias_linear=False,
    gated_linear_unit=True,
    activation_func=torch.nn.functional.silu,
    normalization="RMSNorm",
    qk_layernorm=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


def start(tp: int = 1, ep: int = 1, etp: int = 1, pp: int = 1) -> None:
    """Process groups and seeds; the world's size comes from the launcher's variables, or is 1."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(123)


def tiny_config(kind=TransformerConfig, **changes) -> TransformerConfig:
    world = dict(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
    )
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages > 1:
        world |= dict(pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32, num_layers=2 * stages)
    return kind(**{**cpu_config_options(), **SHAPE, **world, **changes})


def latent_config(**changes) -> MLATransformerConfig:
    """The same model with multi-latent attention."""
    mla = dict(q_lora_rank=24, kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=12, rope_type="rope")
    return tiny_config(kind=MLATransformerConfig, multi_latent_attention=True, num_query_groups=8, **{**mla, **changes})


def local_spec(config: TransformerConfig):
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
        multi_latent_attention=config.multi_latent_attention,
    )
    if config.multi_latent_attention:
        spec.submodules.self_attention.submodules.core_attention = LatentCoreAttention
    return spec


def tiny_model(config: TransformerConfig, spec=None, **options) -> GPTModel:
    torch.manual_seed(1 + parallel_state.get_pipeline_model_parallel_rank())
    ends = dict(pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage())
    model = GPTModel(
        config,
        spec or local_spec(config),
        **{**dict(vocab_size=VOCAB, max_sequence_length=256, position_embedding_type="rope", parallel_output=True), **ends, **options},
    ).eval()
    draw_weights(model)
    return model


def draw_weights(model: torch.nn.Module) -> None:
    """Of a model seeded alike on all ranks of a stage: experts are drawn per rank, since equal ones would hide a token sent to a wrong one.

    Weights are scaled up: the default initialisation gives near-uniform attention, in which a lost entry is invisible.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    expert_rank = dist.get_rank(parallel_state.get_expert_model_parallel_group())
    own_experts = torch.Generator().manual_seed(100 + expert_rank + 1000 * stage)
    own_heads = torch.Generator().manual_seed(200 + tp_rank + 1000 * stage)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data.normal_(0, 0.1, generator=own_experts)
        elif any(f"linear_{part}" in name for part in ("qkv", "q_up_proj", "kv_up_proj", "kv_down_proj", "q_down_proj")):
            parameter.data.normal_(0, 0.2, generator=own_heads)


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def positions(ids: torch.Tensor, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + ids.shape[1]).expand(ids.shape[0], -1)


def causal_mask(queries: int, start: int = 0) -> torch.Tensor:
    """Megatron's convention: True hides; [1, 1, queries, keys]."""
    return torch.triu(torch.ones(queries, start + queries, dtype=torch.bool), 1 + start)[None, None]
