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
from .runner import Piece
from .spec import ServeSpec


class HFRunner:
    """Experts whole on every rank, or sharded by AutoEP (spec.ep)."""

    def __init__(self, spec: ServeSpec) -> None:
        backend = HFBackend(spec.for_backend(), spec.timeout_s)
        self.tokenizer, self.model = backend.tokenizer, backend.model
        self.attached = attach(self.model, spec.block, backend.group, requests="distinct")
        self.cache = self.attached.new_cache()
        self.device = self.cache.core.device
        self.eos, self.vocabulary = eos_of(self.model), self.model.get_input_embeddings().num_embeddings
        self.data_rank, self.speaks = backend.data_rank, True
        self.shares_prefixes = why_not_shared(self.cache.core)
        self._stored: dict[int, int] = {}
        """Request -> tokens stored, in the order of the cache's rows."""
        self._wanted: Tensor | None = None
        head = self.model.get_output_embeddings()
        if head is None:
            raise UnsupportedError(f"{type(self.model).__name__} has no output embeddings; a service needs a language model")
        self._hook = head.register_forward_pre_hook(self._keep_wanted)

    def _keep_wanted(self, head: nn.Module, args: tuple) -> tuple:
        """Logits are made for these tokens alone; whatever the model does to logits comes after."""
        return (args[0].index_select(1, self._wanted), *args[1:])

    @torch.no_grad()
    def step(self, pieces: Sequence[Piece], drop: Sequence[int]) -> dict[int, Tensor]:
        at = {number: row for row, number in enumerate(self._stored)}
        by_number = {piece.number: piece for piece in pieces}
        stay = {number: count for number, count in self._stored.items() if number not in drop}
        order = [*stay, *(number for number in by_number if number not in stay)]
        rows = Rows([], [], [])
        for number in order:
            piece = by_number.get(number)
            rows.parent.append(at.get(number if piece is None or piece.source < 0 else piece.source, -1))
            rows.keep.append(stay[number] if piece is None else piece.start)
            rows.new.append(0 if piece is None else len(piece.tokens))
        running = [by_number[number] for number in order if number in by_number]
        tokens, wanted, where = [], [], {}
        for piece in running:
            end = len(tokens) + len(piece.tokens)
            first = len(tokens) if piece.all_logits else end - 1
            where[piece.number] = slice(len(wanted), len(wanted) + end - first)
            wanted += range(first, end)
            tokens += piece.tokens
        self._wanted = torch.tensor(wanted or [0], device=self.device)
        with self.cache.packed(rows) as packed:
            ids = torch.tensor([tokens], device=self.device) if tokens else packed.index_of_nothing
            logits = self.model(input_ids=ids, position_ids=packed.position_ids, past_key_values=self.cache, use_cache=True).logits
        self._stored = dict(zip(order, (keep + new for keep, new in zip(rows.keep, rows.new, strict=True)), strict=True))
        return {number: logits[0, each].float() for number, each in where.items()}

    def stats(self) -> dict[str, Any]:
        return self.cache.stats()

    def close(self) -> None:
        self._hook.remove()
        self.attached.detach()


def eos_of(model: Any) -> frozenset[int]:
    """Tokens that end a text, as its generation configuration names them."""
    found = model.generation_config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or ())
