"""A transformers model, or that of a Megatron checkpoint, in Megatron-Core on tensor- and expert-parallel ranks; static batching."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pikv_ds.adapters.hf.argument_names import IN_GENERATE
from pikv_ds.adapters.hf.model_spec import read_model_spec
from pikv_ds.launch.device import own_device
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, disable_pikv, enable_pikv
from pikv_ds.megatron_patch.args_config import read_architecture
from pikv_ds.megatron_patch.checkpoint import load_checkpoint
from pikv_ds.megatron_patch.checkpoint_folder import checkpoint_args
from pikv_ds.megatron_patch.context import all_logits
from pikv_ds.megatron_patch.hf_config import build_gpt
from pikv_ds.megatron_patch.hf_weights import load_hf_weights
from pikv_ds.megatron_patch.layers import find_layers
from pikv_ds.spec import LayerSpec

from .backend import Memory, block_evicts, counts_of, watch
from .megatron_lm import Group, GroupedCache, MegatronCausalLM
from .spec import EvalSpec
from .tokenizer import check_vocabulary, open_tokenizer


class MegatronBackend:
    name = "megatron"
    evicts = staticmethod(block_evicts)

    def __init__(self, spec: EvalSpec, timeout_s: float) -> None:
        """torch.distributed is initialised; the process groups of Megatron are made here and end with close()."""
        self._patched = cpu_compat.install()
        parallel_state.initialize_model_parallel(
            spec.tp,
            expert_model_parallel_size=spec.ep,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        )
        model_parallel_cuda_manual_seed(spec.seed)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.speaks = parallel_state.get_tensor_model_parallel_rank() == 0
        """The first of its tensor-parallel peers, which all have the same logits."""
        self._open = 0  # PiKV sessions
        self.folder = spec.model
        self.tokenizer = open_tokenizer(spec.tokenizer or spec.model)
        self.model, self.layers = _load(spec) if spec.tokenizer is None else _load_own(spec, self.tokenizer)

    @contextlib.contextmanager
    def session(self, block: dict[str, Any] | None, rows: int, length: int) -> Iterator[_Dense | _Sharded]:
        if block is None:
            yield _Dense(self.model, StaticInferenceContext(rows, length))
            return
        with self._enabled(block):
            context = PiKVInferenceContext(rows, length, model=self.model)
            try:
                yield _Sharded(self.model, context)
            finally:
                context.free()

    @contextlib.contextmanager
    def _enabled(self, block: dict[str, Any]) -> Iterator[None]:
        """Sessions of one configuration may be open side by side."""
        if not self._open:
            enable_pikv(self.model, block)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                disable_pikv(self.model)

    @functools.cached_property
    def causal_lm(self) -> MegatronCausalLM:
        return MegatronCausalLM(self.model, self.folder)

    @contextlib.contextmanager
    def generation(self, block: dict[str, Any] | None, attention_mask: Tensor, length: int) -> Iterator[dict[str, Any]]:
        """Rows with as much padding share a session, which is fed without it: Megatron's attention hides no padding behind a window."""
        padding = (attention_mask == 0).sum(1).tolist()
        with contextlib.ExitStack() as sessions:
            groups = []
            for width in sorted(set(padding)):
                rows = [row for row, own in enumerate(padding) if own == width]
                groups.append(Group(rows, width, sessions.enter_context(self.session(block, len(rows), length - width))))
            yield {IN_GENERATE: GroupedCache(groups)}

    def close(self) -> None:
        parallel_state.destroy_model_parallel()
        if self._patched:
            cpu_compat.uninstall()


class _Dense:
    whole = False

    def __init__(self, model: Any, context: Any) -> None:
        self.model, self.context = model, context
        all_logits(context)
        self.device = next(model.parameters()).device

    def expect(self, tokens: int) -> None:
        """Nothing is evicted."""

    def feed(self, ids: Tensor, *, last: bool = False) -> Tensor:
        start, (rows, columns) = self.context.sequence_len_offset, ids.shape
        positions = torch.arange(start, start + columns, device=self.device).expand(rows, -1)
        # Megatron's convention: True hides. Without a mask a chunk after the first would be taken for one without a past.
        hidden = torch.ones(columns, start + columns, dtype=torch.bool, device=self.device).triu(1 + start)[None, None]
        mask = hidden if columns > 1 else None
        logits = self.model(ids.to(self.device), positions, mask, inference_context=self.context, runtime_gather_output=True)
        self.context.increment_sequence_len_offset(columns)
        return (logits[:, -1:] if last else logits).float()

    def memory(self) -> Memory:
        held = [tensor for pair in self.context.key_value_memory_dict.values() for tensor in pair]
        core_attention = type(find_layers(self.model)[0].attention.core_attention).__name__
        size = sum(tensor.untyped_storage().nbytes() for tensor in held)
        return Memory(size, size, f"StaticInferenceContext + {core_attention}")

    def watch(self, on: bool) -> None:
        """Reads everything."""


class _Sharded(_Dense):
    def expect(self, tokens: int) -> None:
        self.context.expect_prompt(tokens)

    def memory(self) -> Memory:
        stats = self.context.stats()
        return Memory(stats["kv_bytes_allocated"], stats["kv_bytes_dense"], stats["attention_impl"], *counts_of(self.context.core))

    def watch(self, on: bool) -> None:
        watch(self.context.core, on)


def _load(spec: EvalSpec) -> tuple[Any, list[LayerSpec]]:
    config = AutoConfig.from_pretrained(spec.model, local_files_only=True)
    model = build_gpt(config, max_sequence_length=spec.context, **_options(spec)).eval()
    if spec.load is not None:
        load_checkpoint(model, spec.load)
    else:
        hf = AutoModelForCausalLM.from_pretrained(spec.model, dtype=getattr(torch, spec.dtype), local_files_only=True)
        load_hf_weights(model, config, hf.state_dict())
    return model.to(own_device()), read_model_spec(config)


def _load_own(spec: EvalSpec, tokenizer: Any) -> tuple[Any, list[LayerSpec]]:
    """The model that the checkpoint's arguments say, with local layers in place of whatever trained it."""
    architecture = read_architecture(checkpoint_args(spec.load))
    check_vocabulary(tokenizer, architecture.vocab_size, f"--tokenizer {spec.tokenizer}")
    model = architecture.build(**_options(spec)).eval()
    load_checkpoint(model, spec.load)
    architecture.finish(model)
    return model.to(own_device()), architecture.layer_specs()


def _options(spec: EvalSpec) -> dict[str, Any]:
    dtype = getattr(torch, spec.dtype)
    options = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    return options if torch.cuda.is_available() else options | cpu_compat.cpu_config_options()
