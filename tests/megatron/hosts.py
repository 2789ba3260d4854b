"""What the tests build in another way on each Megatron-Core: its own objects around a model and a context."""

import contextlib
import inspect

import torch
from megatron.core.inference import utils
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines import dynamic_engine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

from tests.megatron.models import VOCAB


def wrapper_config(model, **limits):
    """limits: inference_max_requests, inference_max_seq_length. None from 0.17 on, where the context says it all."""
    if "inference_wrapper_config" not in inspect.signature(GPTInferenceWrapper.__init__).parameters:
        return None
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

    return InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=torch.float32,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=VOCAB,
        **limits,
    )


def inference_wrapper(model, context, config=None) -> GPTInferenceWrapper:
    """config: what wrapper_config gave, for other limits than its defaults."""
    config = config or wrapper_config(model)
    return GPTInferenceWrapper(model, *([] if config is None else [config]), context)


def takes_configs() -> bool:
    """Whether DynamicInferenceContext takes (model_config, inference_config), from 0.17 on, in place of many arguments."""
    return "inference_config" in inspect.signature(DynamicInferenceContext.__init__).parameters


def pauses() -> bool:
    """Whether ranks behind the coordinator pause before they stop, and clients get requests, both from 0.17 on."""
    return hasattr(dynamic_engine, "EngineState")


def merged(answer):
    """What a client was answered, as one request."""
    return answer.merge() if hasattr(answer, "merge") else answer


def dynamic_arguments(config, *, blocks: int, paused: int, **more) -> dict:
    """Arguments of DynamicInferenceContext for a buffer of so many blocks, some of them for paused requests.

    more: max_sequence_length, block_size_tokens, ...; the names are the same in both ways.
    """
    heads = max(1, config.num_query_groups // config.tensor_model_parallel_size)
    block_bytes = 4 * 2 * config.num_layers * more["block_size_tokens"] * heads * config.kv_channels
    sizes = dict(buffer_size_gb=(blocks + 0.5) * block_bytes / 1024**3, paused_buffer_size_gb=(paused + 0.5) * block_bytes / 1024**3)
    if takes_configs():
        from megatron.core.inference.config import InferenceConfig

        return dict(model_config=config, inference_config=InferenceConfig(**sizes, **more))
    return dict(
        params_dtype=torch.float32,
        num_layers=config.num_layers,
        kv_channels=config.kv_channels,
        num_attention_heads=config.num_query_groups,
        tensor_model_parallel_size=min(config.tensor_model_parallel_size, config.num_query_groups),
        **sizes,
        **more,
    )


def blocks_in_use(context: DynamicInferenceContext) -> int:
    return (context.kv_block_allocator if takes_configs() else context.block_allocator).get_total_used()


def dummy_forward(wrapper: GPTInferenceWrapper) -> None:
    """What the engine's controller has a rank without work do: up to 0.17 without the context, from 0.18 on with it."""
    if hasattr(wrapper, "dummy_forward"):
        wrapper.dummy_forward()
        return
    context = wrapper.inference_context
    context.initialize_attention_state(is_expert_parallel_dummy_cuda_graph_step=True)
    ids, at = context.current_input_and_position_ids()
    with torch.inference_mode():
        wrapper.run_one_forward_step({"tokens": ids, "position_ids": at, "attention_mask": None})
    kept = inspect.signature(DynamicInferenceContext.reset).parameters.keys() & {"preserve_prefix_cache", "preserve_counters"}
    context.reset(**dict.fromkeys(kept, True))


def engine_runs() -> contextlib.AbstractContextManager:
    """What an engine says of itself from 0.18 on, and a model asks before it gives the last logits of each request alone."""
    return utils.InferenceMode.active() if hasattr(utils, "InferenceMode") else contextlib.nullcontext()
