"""The same model in Megatron-Core behind a service: tensor- and expert-parallel ranks, requests packed into one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from pikv_ds.launch.evaluation.megatron import MegatronBackend
from pikv_ds.megatron_patch import PiKVPackedContext, cpu_compat, enable_pikv

from .prefix import why_not_shared
from .rows import RowOrder
from .runner import Piece, eos_of
from .spec import ServeSpec


class MegatronRunner:
    def __init__(self, spec: ServeSpec) -> None:
        self.backend = backend = MegatronBackend(spec.for_backend(), spec.timeout_s)
        self.tokenizer, self.model = backend.tokenizer, backend.model
        enable_pikv(self.model, spec.block)
        self.context = PiKVPackedContext(spec.max_length, model=self.model)
        self.device = self.context.core.device
        self.data_rank, self.speaks = backend.data_rank, backend.speaks
        self.eos, self.vocabulary = eos_of(GenerationConfig.from_pretrained(spec.model)), self.model.vocab_size
        self.shares_prefixes = why_not_shared(self.context.core)
        self.rows = RowOrder(self.device)
        self._hook = self.model.output_layer.register_forward_pre_hook(self._keep_wanted)

    def _keep_wanted(self, head: nn.Module, args: tuple) -> tuple:
        return (args[0].index_select(0, self.rows.wanted), *args[1:])

    @torch.no_grad()
    def step(self, pieces: Sequence[Piece], drop: Sequence[int]) -> dict[int, Tensor]:
        rows, ids = self.rows.plan(pieces, drop)
        with cpu_compat.cuda_literals_on_cpu(), self.context.packed(*rows) as positions:
            logits = self.model(ids, positions, None, inference_context=self.context, runtime_gather_output=True)
        return self.rows.logits(logits[0, :, : self.vocabulary])

    def stats(self) -> dict[str, Any]:
        return self.context.stats()

    def close(self) -> None:
        self._hook.remove()
        self.backend.close()
