"""The model that a Megatron-LM checkpoint is of, from the arguments that were saved with it: as Megatron-Core arguments, and built.

What changes the model's mathematics is taken from the arguments; parallelism, dtypes, kernels, recomputation and what only training does
are the caller's, or Megatron-Core's defaults.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from torch import nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec

from .args_checks import check_complete, refuse_args
from .layers import window_of
from .local_layers import local_decoder

# Fields of TransformerConfig that decide how a model is computed, trained or spread, and not what it is. Names that end in * are prefixes.
_NOT_THE_MODEL = (
    "account_for_*", "attention_backend", "attention_dropout", "batch_invariant_mode", "bias_activation_fusion", "bias_dropout_fusion",
    "cache_mla_latents", "calculate_per_token_loss", "config_logger_dir", "cp_comm_type", "cuda_graph*", "enable_cuda_graph",
    "external_cuda_graph", "embedding_init_method*", "flash_*", "fp4*", "fp8*", "fused_*", "hidden_dropout", "inference_*", "init_*",
    "kitchen_*", "log_max_attention_logit", "masked_softmax_fusion", "memory_efficient_layer_norm", "mlp_chunks_*", "moe_deepep*",
    "moe_enable_deepep", "moe_flex_*", "moe_grouped_gemm", "moe_hybridep*", "moe_input_jitter_eps", "moe_layer_recompute", "moe_ncclep*",
    "moe_paged_stash*", "moe_permute_fusion*", "moe_router_force_*", "moe_router_fusion", "moe_router_padding_*",
    "moe_shared_expert_overlap", "moe_single_grouped_*", "moe_token_dispatcher_type", "moe_use_legacy_grouped_gemm", "mtp_*",
    "nccl_all_reduce_*", "num_layers_in_*", "offload*", "fine_grained_*", "output_layer_init_method", "persist_layer_norm",
    "pipeline_model_parallel_layout", "quant_recipe", "recompute_*", "symmetric_ar_type", "transformer_impl", "use_fused_*",
    "use_grouped_gemm_*", "use_inference_optimized_layers", "use_kitchen*", "use_te_activation_func", "use_transformer_engine_*",
    "distribute_saved_activations", "apply_rope_fusion",
)  # fmt: skip
_TAKEN_APART = ("layernorm_epsilon", "layernorm_zero_centered_gamma", "num_moe_experts", "num_query_groups", "rope_type", "is_hybrid_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """kind: TransformerConfig, or its subclass for MLA. config, gpt: arguments of it and of GPTModel.

    gamma_from_one: norms are stored as what their weights exceed 1 by (--apply-layernorm-1p).
    """

    kind: type[TransformerConfig]
    config: dict[str, Any]
    gpt: dict[str, Any]
    gamma_from_one: bool

    @property
    def num_experts(self) -> int:
        return self.config["num_moe_experts"] or 1

    @property
    def max_positions(self) -> int:
        return self.gpt["max_sequence_length"]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: those that pad the tokenizer's vocabulary included."""
        return self.gpt["vocab_size"]

    def layer_specs(self) -> list[LayerSpec]:
        """KV geometry of the whole model."""
        config = self._config({})
        return [_layer_spec(config, idx) for idx in range(config.num_layers)]

    def build(self, **options: Any) -> GPTModel:
        """An unloaded GPTModel with Megatron's local layers on the groups of parallel_state.

        Args: options: TransformerConfig arguments, which win over those from the checkpoint (on CPU: cpu_compat.cpu_config_options()).

        Raises: UnsupportedError when the vocabulary can't be cut for the tensor-parallel ranks, or the model can't be built.
        """
        layout: dict[str, Any] = {
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        }
        layout["pipeline_dtype"] = options.get("params_dtype", torch.float32)  # of hidden states between stages
        config = self._config({**layout, **options})
        if self.vocab_size % config.tensor_model_parallel_size:
            raise UnsupportedError(
                f"padded_vocab_size = {self.vocab_size} of the checkpoint is not a multiple of tensor_model_parallel_size = "
                f"{config.tensor_model_parallel_size}, and rows that pad it further would take a share of every softmax"
            )
        if self.gamma_from_one and config.params_dtype != torch.float32:
            raise UnsupportedError(
                f"apply_layernorm_1p with params_dtype = {config.params_dtype}: local layers hold 1 + the stored weight, which is rounded "
                f"there; use float32"
            )
        ends = {"pre_process": parallel_state.is_pipeline_first_stage(), "post_process": parallel_state.is_pipeline_last_stage()}
        return GPTModel(config, local_decoder(config), **self.gpt, **ends)

    def finish(self, model: nn.Module) -> None:
        """After the weights were loaded: what local layers keep in another form than the checkpoint."""
        if self.gamma_from_one:
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm):
                        module.weight += 1

    def _config(self, options: dict[str, Any]) -> TransformerConfig:
        given = {**self.config, **options}
        try:
            return self.kind(**given)
        except (ValueError, AssertionError, TypeError) as error:
            raise UnsupportedError(f"Megatron-Core does not take the checkpoint's arguments as they are: {error}") from error


def read_architecture(args: Namespace) -> Architecture:
    """args: what checkpoint_args gives.

    Raises: UnsupportedError naming the argument that is not there, or that local layers, GPTModel or this mapping can't honour.
    """
    refuse_args(args)
    check_complete(args)
    latent = bool(getattr(args, "multi_latent_attention", False))
    kind = MLATransformerConfig if latent else TransformerConfig
    config = _same_names(args, kind) | {
        "layernorm_epsilon": getattr(args, "norm_epsilon", None) or args.layernorm_epsilon,
        "num_moe_experts": args.num_experts or None,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "moe_token_dispatcher_type": "alltoall",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if latent and getattr(args, "rope_type", None) is not None:
        config["rope_type"] = args.rope_type
    if config["num_moe_experts"] is None:  # what Megatron-LM saves of experts that a model has not is refused beside none
        config = {name: value for name, value in config.items() if not name.startswith("moe_")}
    config |= _activation(args)
    gpt = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "rotary_base": getattr(args, "rotary_base", 10000),
        "rope_scaling": bool(getattr(args, "use_rope_scaling", False)),
    }
    return Architecture(kind=kind, config=config, gpt=gpt, gamma_from_one=_gamma_from_one(args))


def _same_names(args: Namespace, kind: type[TransformerConfig]) -> dict[str, Any]:
    spread = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    names = [field.name for field in dataclasses.fields(kind) if field.init and field.name not in spread and not _left(field.name)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _left(name: str) -> bool:
    return name in _TAKEN_APART or any(name.startswith(left[:-1]) if left.endswith("*") else name == left for left in _NOT_THE_MODEL)


def _activation(args: Namespace) -> dict[str, Any]:
    if args.swiglu:
        return {"activation_func": torch.nn.functional.silu, "gated_linear_unit": True}
    if getattr(args, "squared_relu", False):
        return {"activation_func": squared_relu}
    return {"activation_func": quick_gelu, "gated_linear_unit": True} if getattr(args, "quick_geglu", False) else {}


def _gamma_from_one(args: Namespace) -> bool:
    return bool(getattr(args, "apply_layernorm_1p", False) or getattr(args, "layernorm_zero_centered_gamma", False))


def _layer_spec(config: TransformerConfig, idx: int) -> LayerSpec:
    window = window_of(config, idx + 1)
    if config.multi_latent_attention:
        rank = config.kv_lora_rank
        return LayerSpec(layer_idx=idx, num_kv_heads=1, k_dim=rank + config.qk_pos_emb_head_dim, v_dim=rank, window=window, latent=True)
    return LayerSpec(layer_idx=idx, num_kv_heads=config.num_query_groups, k_dim=config.kv_channels, v_dim=config.kv_channels, window=window)
