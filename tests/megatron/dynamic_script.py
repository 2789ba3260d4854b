"""A Megatron-LM user's dynamic-inference script in small, without PiKV: the functions of examples/inference/gpt/gpt_dynamic_inference.py
at core_v0.16.1, and with the arguments of a later Megatron-Core where that is installed. Jobs run it as it is, over Megatron's own cache,
and again with PiKV installed or with the diff of docs/guide/megatron.md.
"""

import argparse
import logging

import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

from tests.megatron import hosts
from tests.megatron.static_script import Tokenizer

BLOCK = 16


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inference-max-seq-length", type=int, default=160)
    parser.add_argument("--inference-dynamic-batching-blocks", type=int, default=60)
    parser.add_argument("--inference-dynamic-batching-paused-blocks", type=int, default=24)
    parser.add_argument("--inference-dynamic-batching-max-requests", type=int, default=8)
    parser.add_argument("--inference-dynamic-batching-max-tokens", type=int, default=64)  # prompts are longer: they are prefilled in chunks
    parser.add_argument("--disable-chunked-prefill", action="store_true")
    parser.add_argument("--return-log-probs", action="store_true")
    return parser.parse_args(argv)


def block_gb(config) -> float:
    heads = config.num_attention_heads if config.num_query_groups is None else config.num_query_groups
    on_this_rank = max(1, heads // config.tensor_model_parallel_size)
    return 4 * 2 * (config.num_layers // config.pipeline_model_parallel_size) * BLOCK * on_this_rank * config.kv_channels / 1024**3


def get_inference_config(args, config, **more):
    from megatron.core.inference.config import InferenceConfig

    return InferenceConfig(
        max_sequence_length=args.inference_max_seq_length,
        block_size_tokens=BLOCK,
        buffer_size_gb=(args.inference_dynamic_batching_blocks + 0.5) * block_gb(config),
        paused_buffer_size_gb=(args.inference_dynamic_batching_paused_blocks + 0.5) * block_gb(config),
        max_requests=args.inference_dynamic_batching_max_requests,
        max_tokens=args.inference_dynamic_batching_max_tokens,
        materialize_only_last_token_logits=not args.return_log_probs,
        enable_chunked_prefill=not args.disable_chunked_prefill,
        **more,
    )


def get_inference_context(args, config, **more) -> DynamicInferenceContext:
    """more: of InferenceConfig, from 0.17 on."""
    if hosts.takes_configs():
        return DynamicInferenceContext(config, get_inference_config(args, config, **more))
    heads = config.num_attention_heads if config.num_query_groups is None else config.num_query_groups
    num_layers = config.num_layers // config.pipeline_model_parallel_size
    context = DynamicInferenceContext(
        params_dtype=torch.float32,
        num_layers=num_layers,
        kv_channels=config.kv_channels,
        num_attention_heads=heads,
        max_sequence_length=args.inference_max_seq_length,
        num_cuda_graphs=None,
        block_size_tokens=BLOCK,
        buffer_size_gb=(args.inference_dynamic_batching_blocks + 0.5) * block_gb(config),
        paused_buffer_size_gb=(args.inference_dynamic_batching_paused_blocks + 0.5) * block_gb(config),
        max_requests=args.inference_dynamic_batching_max_requests,
        max_tokens=args.inference_dynamic_batching_max_tokens,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        materialize_only_last_token_logits=not args.return_log_probs,
        mamba_inference_state_config=None,
        cache_mla_latent=False,
        use_flashinfer_fused_rope=None,
        unified_memory_level=0,
    )
    return context


def get_inference_controller(model, context: DynamicInferenceContext) -> TextGenerationController:
    model = hosts.inference_wrapper(model, context)
    return TextGenerationController(model, Tokenizer())


def get_engine(args, model, **more) -> DynamicInferenceEngine:
    """From 0.17 on the calls of get_dynamic_inference_engine (megatron/inference/utils.py)."""
    context = get_inference_context(args, model.config, **more)
    controller = get_inference_controller(model, context)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    if hosts.takes_configs():
        return DynamicInferenceEngine(controller, context)
    return DynamicInferenceEngine(
        controller,
        context,
        enable_cuda_graph=False,
        random_seed=1234,
        enable_chunked_prefill=not args.disable_chunked_prefill,
    )


def sampling(num_tokens: int, args=None) -> SamplingParams:
    return SamplingParams(
        num_tokens_to_generate=num_tokens, top_k=1, termination_id=-1, return_log_probs=args is not None and args.return_log_probs
    )
