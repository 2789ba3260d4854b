"""Decode steps of a transformers model as one CUDA graph: the model's layers and the cache's, recorded once and played again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pikv_ds.cache.step_graph import Recorder, StepGraph
from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import eager
from pikv_ds.step.step import LocalStep

from .argument_names import cache_argument
from .cache import HFCache
from .forward_hooks import ForwardHooks
from .host import Host


class DecodeGraph:
    """Of one cache and the rows that it has: graph(ids) is model(ids, past_key_values=cache).logits for a token of each row.

    with torch.no_grad():
        model(prompt, past_key_values=cache)
        graph = DecodeGraph(model, cache, tokens=4096)
        logits = graph(next_ids)

    The first call runs as it is, the second is recorded, the others are played. Logits lie where those of the last call lay. Between calls
    the model may be called as ever; what changes rows, or grows beyond `tokens`, ends the graph (`stale`), and a new one can be made.
    The model itself must ask its device for nothing: transformers' experts by `model.set_experts_implementation("batched_mm")`.
    """

    def __init__(self, model: PreTrainedModel, cache: HFCache, *, tokens: int, recorder: Recorder | None = None) -> None:
        """tokens: that a row may grow to; room for them is allocated now (PiKVCache.reserve). recorder: None = torch.cuda.graph.

        Raises: UnsupportedError, with the reason, where steps can't be recorded (cache/step_graph.py).
        """
        host = Host.of(model)
        if host is None:
            raise UnsupportedError(f"{type(model).__name__} has no PiKV cache attached; call pikv_ds.attach(model, config)")
        self.host, self.model, self.cache = host, model, cache.named()
        attachment = host.attachment_of(self.cache)
        conversation, core = self.cache.conversation, self.cache.core
        if conversation.states.layers:
            raise UnsupportedError("a graph of a model with recurrent or convolution layers: their states are replaced in every step")
        if attachment.penalty is not None:
            raise UnsupportedError(
                "a graph with pikv.routing.host_penalty: penalties are made anew from the state of the cache in every step"
            )
        core.reserve(tokens)
        self._hooks = next(each for each in host.hooks if isinstance(each, ForwardHooks))
        self._ids = _zeros(len(conversation.lens), core.device)
        self._graph: StepGraph[Tensor] = StepGraph(core, self._forward, recorder)

    @property
    def stale(self) -> bool:
        """It can't be played any more; make another."""
        return self._graph.stale

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """ids [B, 1] int64; attention_mask as for the model, where rows are padded. Returns logits [B, 1, V].

        Raises: UnsupportedError, before anything has changed, for a graph that is stale or another kind of step.
        """
        if ids.shape != self._ids.shape:
            raise UnsupportedError(f"this graph plays one token of each of {len(self._ids)} rows, ids are {tuple(ids.shape)}")
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask}

        def run(local: LocalStep) -> Tensor:
            self._ids.copy_(ids)
            return self._graph(local)

        return self._hooks.play(self.cache, given, self._graph.positions, run)

    def _forward(self, positions: Tensor) -> Tensor:
        asked = {"input_ids": self._ids, "position_ids": positions.clamp_min(0).to(torch.int64), "use_cache": True}
        return self.model(**asked, **cache_argument(self.model, self.cache)).logits


@eager
def _zeros(rows: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, 1, dtype=torch.int64, device=device)
