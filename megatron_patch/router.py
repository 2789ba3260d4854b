"""What PiKV adds to the host's TopKRouter: it tells the running context where tokens went, and may heed the state of the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pikv_ds.migration.experts import Experts
from pikv_ds.placement.placement import primary_expert

from .link import Link
from .penalty import RouterPenalty, check_penalty, model_weights
from .placed import by_number
from .subclass import pikv_class


@pikv_class
def router_class(host: type) -> type:
    class PiKVRouter(host):
        """Routing itself is the host's, bit for bit, unless a RouterPenalty was asked for and a PiKV context is running."""

        pikv_link: Link | None = None
        pikv_penalty: RouterPenalty | None = None
        pikv_experts: Tensor | None = None  # [E] int64, the expert of every slot; None = that of its number (experts.py)
        pikv_slots: Tensor | None = None  # [E] int64, the slot of every expert
        pikv_along: Experts | None = None  # of the model, at its first router: experts that move with the shards

        def __init__(self, *args, pikv_penalty: RouterPenalty | None = None, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            check_penalty(pikv_penalty, self.config)
            self.pikv_penalty = pikv_penalty

        def routing(self, logits: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            link = self.pikv_link
            if self.pikv_penalty is None or link is None or link.context is None:
                return super().routing(logits, *args, **kwargs)
            penalty = link.context.router_penalty(link.layer, self.pikv_penalty)
            lowered = logits - (penalty if self.pikv_experts is None else penalty[self.pikv_experts]).to(logits.dtype)
            probs, routing_map = super().routing(lowered, *args, **kwargs)
            if self.pikv_penalty.applies_to == "selection":
                probs = model_weights(logits.view(-1, logits.shape[-1]), routing_map, self.config)
            return probs, routing_map

        def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
            probs, routing_map = super().forward(*args, **kwargs)
            if self.pikv_link is not None and self.pikv_link.context is not None:
                self.pikv_link.context.note_routing(self.pikv_link.layer, self._experts(probs, routing_map))
            return probs, routing_map

        def look_ahead(self, hidden: Tensor) -> Tensor:
            """Primary experts [tokens] int64 that this router would choose for other hidden states [s, b, h]; reports nothing."""
            with torch.no_grad():
                return self._experts(*super().forward(hidden))

        def _experts(self, probs: Tensor, routing_map: Tensor) -> Tensor:
            """By their numbers, where they lie in other slots too."""
            if self.pikv_slots is not None:
                probs, routing_map = probs.index_select(1, self.pikv_slots), routing_map.index_select(1, self.pikv_slots)
            return routed_experts(probs, routing_map)

        def sharded_state_dict(self, *args, **kwargs) -> dict[str, Any]:
            state = super().sharded_state_dict(*args, **kwargs)
            return state if self.pikv_slots is None else by_number(state, self.pikv_experts, self.pikv_slots)

    return PiKVRouter


def routed_experts(probs: Tensor, routing_map: Tensor) -> Tensor:
    """Primary expert of each token, lowest id on ties; -1 for a token that every expert dropped (its probabilities are all zero).

    Args: probs [tokens, E] combine weights, 0 where not routed; routing_map [tokens, E] bool, which with padding to capacity also names
        experts that a token was not routed to. Returns: [tokens] int64. Sync: none.
    """
    routed = routing_map.bool() & (probs > 0)
    weights = probs.detach().float().masked_fill(~routed, -1.0)
    experts = torch.arange(probs.shape[-1], device=probs.device).expand_as(weights)
    return torch.where(routed.any(-1), primary_expert(experts, weights), -1)
