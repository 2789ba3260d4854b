"""A transformers model behind a service: the rows of one PiKV cache are its requests, which come and go between forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pikv_ds.adapters.hf.attach import attach
from pikv_ds.adapters.hf.packed import Rows
from pikv_ds.errors import UnsupportedError
from pikv_ds.launch.evaluation.hf import HFBackend

from .prefix import why_not_shared
from .rows import RowOrder
from .runner import Piece, eos_of
from .spec import ServeSpec


class HFRunner:
    """Experts whole on every rank, or sharded by AutoEP (spec.ep)."""

    def __init__(self, spec: ServeSpec) -> None:
        backend = HFBackend(spec.for_backend(), spec.timeout_s)
        self.tokenizer, self.model = backend.tokenizer, backend.model
        self.attached = attach(self.model, spec.block, backend.group, requests="distinct")
        if self.attached.core.config.storage.prefix.enabled:
            raise UnsupportedError("pikv.storage.prefix is on: the service shares what requests have in common itself; use --prefix-rows")
        self.cache = self.attached.new_cache()
        self.device = self.cache.core.device
        self.eos, self.vocabulary = eos_of(self.model.generation_config), self.model.get_input_embeddings().num_embeddings
        self.data_rank, self.speaks = backend.data_rank, True
        self.shares_prefixes = why_not_shared(self.cache.core)
        self.rows = RowOrder(self.device)
        head = self.model.get_output_embeddings()
        if head is None:
            raise UnsupportedError(f"{type(self.model).__name__} has no output embeddings; a service needs a language model")
        self._hook = head.register_forward_pre_hook(self._keep_wanted)

    def _keep_wanted(self, head: nn.Module, args: tuple) -> tuple:
        """Logits are made for these tokens alone; whatever the model does to logits comes after."""
        return (args[0].index_select(1, self.rows.wanted), *args[1:])

    @torch.no_grad()
    def step(self, pieces: Sequence[Piece], drop: Sequence[int]) -> dict[int, Tensor]:
        rows, ids = self.rows.plan(pieces, drop)
        with self.cache.packed(Rows(*rows)) as packed:
            logits = self.model(input_ids=ids, position_ids=packed.position_ids, past_key_values=self.cache, use_cache=True).logits
        return self.rows.logits(logits[0])

    def stats(self) -> dict[str, Any]:
        return self.cache.stats()

    def close(self) -> None:
        self._hook.remove()
        self.attached.detach()
