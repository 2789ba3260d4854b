"""What PiKV adds to the host's TopKRouter: it tells the running context which experts the tokens of this layer went to."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.placement import primary_expert

from .layers import Link
from .subclass import pikv_class


@pikv_class
def router_class(host: type) -> type:
    class PiKVRouter(host):
        """Routing itself is the host's, bit for bit."""

        pikv_link: Link | None = None

        def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
            probs, routing_map = super().forward(*args, **kwargs)
            if self.pikv_link is not None and self.pikv_link.context is not None:
                self.pikv_link.context.note_routing(self.pikv_link.layer, routed_experts(probs, routing_map))
            return probs, routing_map

        def look_ahead(self, hidden: Tensor) -> Tensor:
            """Primary experts [tokens] int64 that this router would choose for other hidden states [s, b, h]; reports nothing."""
            with torch.no_grad():
                return routed_experts(*super().forward(hidden))

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
