"""A transformers model, on several ranks under DeepSpeed: experts sharded by AutoEP (--ep) or whole on every rank."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pikv_ds.adapters.deepspeed.groups import all_ranks, own_group
from pikv_ds.adapters.hf.argument_names import cache_argument
from pikv_ds.adapters.hf.attach import attach
from pikv_ds.adapters.hf.model_spec import read_model_spec
from pikv_ds.cache.stats import dense_bytes
from pikv_ds.launch.device import own_device

from .backend import Memory, block_evicts, counts_of, watch
from .spec import EvalSpec


class HFBackend:
    name = "hf"
    evicts = staticmethod(block_evicts)

    def __init__(self, spec: EvalSpec, timeout_s: float) -> None:
        dtype = getattr(torch, spec.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype, local_files_only=True).eval()
        self.layers = read_model_spec(model.config)
        self.data_rank = dist.get_rank() if dist.is_initialized() else 0
        members = all_ranks()
        if spec.ep > 1:
            model, members = _shard_experts(model, spec)
        self.model = model.to(own_device())
        self.group = own_group(members, timeout_s)

    @contextlib.contextmanager
    def session(self, block: dict[str, Any] | None, rows: int, length: int) -> Iterator[DenseSession | PiKVSession]:
        if block is None:
            yield DenseSession(self.model)
            return
        with attach(self.model, block, self.group) as cache:
            yield PiKVSession(self.model, cache)

    @property
    def causal_lm(self) -> Any:
        return self.model

    @contextlib.contextmanager
    def generation(self, block: dict[str, Any] | None, attention_mask: Tensor, length: int) -> Iterator[dict[str, Any]]:
        with self.session(block, len(attention_mask), length):  # while attached, generate() takes the cache by itself
            yield {}

    def close(self) -> None:
        """Nothing outlives a session."""


class PiKVSession:
    whole = False

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        """A long forward need not make the logits of all its tokens."""

    def feed(self, ids: Tensor, *, last: bool = False) -> Tensor:
        given = cache_argument(self.model, self.cache) | ({"logits_to_keep": 1} if last and self.keeps else {})
        logits = self.model(ids.to(self.model.device), **given, use_cache=True).logits
        return (logits[:, -1:] if last else logits).float()

    def expect(self, tokens: int) -> None:
        self.cache.expect_prompt(tokens)

    def memory(self) -> Memory:
        stats = self.cache.stats()
        return Memory(stats["kv_bytes_allocated"], stats["kv_bytes_dense"], stats["attention_impl"], *counts_of(self.cache.core))

    def watch(self, on: bool) -> None:
        watch(self.cache.core, on)


class DenseSession(PiKVSession):
    def __init__(self, model: Any) -> None:
        super().__init__(model, DynamicCache(config=model.config))

    def watch(self, on: bool) -> None:
        """Reads everything."""

    def expect(self, tokens: int) -> None:
        """Nothing is evicted."""

    def memory(self) -> Memory:
        name = f"DynamicCache + {self.model.config._attn_implementation}"
        if not self.cache.get_seq_length():  # before a prompt that comes in one forward: layers have no tensors yet
            return Memory(0, 0, name)
        held = sum(tensor.untyped_storage().nbytes() for layer in self.cache.layers for tensor in (layer.keys, layer.values))
        rows, columns = self.cache.layers[0].keys.shape[0], self.cache.get_seq_length()
        layers, itemsize = read_model_spec(self.model.config), self.cache.layers[0].keys.dtype.itemsize
        dense = sum(dense_bytes(spec, rows, columns, itemsize) for spec in layers)
        return Memory(held, dense, name)


def _shard_experts(model: Any, spec: EvalSpec) -> tuple[Any, tuple[int, ...]]:
    """The model with AutoEP's expert layers, and the ranks of its expert-parallel group."""
    import deepspeed

    from pikv_ds.adapters.deepspeed.autoep import check_expert_parallel, expert_group_members
    from pikv_ds.adapters.deepspeed.autoep_shim import registry_shim

    config = {"train_micro_batch_size_per_gpu": 1, "expert_parallel": {"enabled": True, "autoep_size": spec.ep}}
    check_expert_parallel(config, model)
    with registry_shim():
        # Sharded in fp32 and converted after: DeepSpeed's "bf16" and "fp16" blocks bring optimizers, which want expert parameter groups.
        engine = deepspeed.initialize(model=model.float(), config=config)[0]
    engine.eval()
    return engine.module.to(getattr(torch, spec.dtype)), expert_group_members(engine.module)
