"""What the attention and the router of one layer have in common: the context of the running forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from .expert_ids import ExpertIds
from .penalty import RouterPenalty


class Context(Protocol):
    """What a layer asks of a PiKVContext."""

    expert_ids: ExpertIds

    def rotary_rows(self, columns: int) -> slice | Tensor | None: ...

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        latent: Tensor | None = None,
        looked_ahead: Tensor | None = None,
        idle: bool = False,
    ) -> Tensor: ...

    def note_routing(self, layer: int, ids: Tensor) -> None: ...

    def router_penalty(self, layer: int, penalty: RouterPenalty) -> Tensor: ...


@dataclass(slots=True)
class Link:
    """Not a module, so in no checkpoint."""

    layer: int
    router: nn.Module | None  # a PiKV router: it tells the context which experts it chose
    context: Context | None = None
    serving: Context | None = None  # joins forwards that come without a context
