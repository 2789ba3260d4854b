"""What the tests build in another way on each Megatron-Core: its own objects around a model and a context."""

import inspect

import torch
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

from tests.megatron.models import VOCAB


def inference_wrapper(model, context, **limits) -> GPTInferenceWrapper:
    """limits: inference_max_requests, inference_max_seq_length. From 0.17 on a wrapper takes all it needs from the context."""
    if "inference_wrapper_config" not in inspect.signature(GPTInferenceWrapper.__init__).parameters:
        return GPTInferenceWrapper(model, context)
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

    config = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=torch.float32,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=VOCAB,
        **limits,
    )
    return GPTInferenceWrapper(model, config, context)
