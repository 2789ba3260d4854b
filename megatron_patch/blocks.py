"""Megatron-Core's dynamic context with blocks that are counted but have no memory: all that differs between its versions stands here."""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from torch import Tensor

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import eager

_GRAPHS = "pages grow between steps, which a captured graph can't follow; leave it at None"
_BUFFER = "there is no block buffer to {}; leave it at {!r}"
REFUSED = {  # arguments of 0.16, fields of InferenceConfig from 0.17 on: what they may be, and why nothing else
    "num_cuda_graphs": ((None, 0), _GRAPHS),
    "use_flashinfer_fused_rope": ((None, False), "PiKV rotates with Megatron's own tables; leave it at False"),
    "mamba_inference_state_config": ((None,), "hybrid models keep states that are not keys and values; PiKV does not handle them"),
    "unified_memory_level": ((None, 0), _BUFFER.format("place", 0)),
    "offload_kv_cache": ((None, False), _BUFFER.format("offload", False)),
    "kv_cache_management_mode": (("persist", "recompute"), _BUFFER.format("offload", "persist")),
    "static_kv_memory_pointers": ((None, False), _BUFFER.format("keep in place", False)),
    "enable_prefix_caching": ((None, False), "blocks that requests share are promises without memory here; leave it at False"),
    "num_speculative_tokens": ((None, 0), "the heads that speculate have caches of their own; leave it at 0"),
    "async_sched_mode": ((None, "legacy"), "PiKV reads the table of requests that a forward was laid out with; leave it at 'legacy'"),
}


class _OfArguments(DynamicInferenceContext):
    """0.16: keyword arguments; tensors are allocated by one method, which a resume calls too."""

    dummy_step = False

    @eager  # an engine that resumes under torch.inference_mode() would make tensors that reset() can't change
    def allocate_all_tensors(self, *, is_init: bool) -> None:
        """The host's bookkeeping, and a block buffer without layers: it takes no memory, and a kernel that reaches for it fails."""
        num_layers, self.num_attention_layers = self.num_attention_layers, 0
        try:
            super().allocate_all_tensors(is_init=is_init)
        finally:
            self.num_attention_layers = num_layers

    @property
    def blocks(self):
        return self.block_allocator

    @property
    def positions(self) -> Tensor:
        """[max_tokens] on the model's device: of the tokens that the forward was laid out with."""
        return self.token_to_pos_ids


class _OfConfigs(DynamicInferenceContext):
    """From 0.17 on: (model_config, inference_config); the buffer is allocated by a method of its own.

    From 0.18 on the table of requests is on the CPU, and a rank without work runs its dummy forward with the context, for a request that
    is none (dummy_step); before, without one.
    """

    dummy_step = False

    def initialize_attention_state(self, *args, is_expert_parallel_dummy_cuda_graph_step: bool = False, **kwargs):
        self.dummy_step = is_expert_parallel_dummy_cuda_graph_step
        if self.dummy_step:
            kwargs["is_expert_parallel_dummy_cuda_graph_step"] = True
        return super().initialize_attention_state(*args, **kwargs)

    @eager  # as _OfArguments.allocate_all_tensors
    def initialize_all_tensors(self) -> None:
        super().initialize_all_tensors()

    def _allocate_memory_buffer(self) -> None:
        """A block buffer without layers, as in _OfArguments."""
        num_layers, self.num_attention_layers = self.num_attention_layers, 0
        try:
            super()._allocate_memory_buffer()
        finally:
            self.num_attention_layers = num_layers

    @property
    def blocks(self):
        return self.kv_block_allocator

    @property
    def positions(self) -> Tensor:
        return getattr(self, "gpu_view", self).token_to_pos_ids


CountedBlocks: type[Any] = _OfConfigs if hasattr(DynamicInferenceContext, "_allocate_memory_buffer") else _OfArguments


def refuse_options(args: tuple, options: dict) -> None:
    """Raises UnsupportedError for arguments of the host's context that PiKV cannot honour. TypeError: not the host's arguments."""
    given = inspect.signature(DynamicInferenceContext.__init__).bind(None, *args, **options).arguments
    given = given | vars(given["inference_config"]) if "inference_config" in given else given
    for name, (allowed, reason) in REFUSED.items():
        value = given.get(name, allowed[0])
        if value not in allowed:
            raise UnsupportedError(f"PiKVDynamicInferenceContext({name} = {value!r}): {reason}")
