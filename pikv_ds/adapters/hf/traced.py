"""What torch.compile sees of a cache: three opaque ops, so that layers compile with fullgraph=True and no break in the graph.

| op of `pikv_host` | called by | what it does when it runs |
|---|---|---|
| `bring` | `update` of a layer of the cache | hands new keys and values to the layer |
| `routed` | hooks on routers | tells which experts the tokens of a layer went to |
| `attention` | the attention function "pikv" | what that does without a compiler |

They find the cache by the forward that runs in this thread, not by an argument: compiled code is the same for all caches and conversations.
A compiler may drop or reorder what changes nothing that it sees; so all of them write to `CLOCK`. No op has a backward: where a graph is
recorded the attention function is a break, as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.placement.placement import Routed

CLOCK = torch.zeros((), dtype=torch.int64)
"""Counts calls. Nobody reads it."""

LIBRARY = torch.library.Library("pikv_host", "DEF")
_SCHEMAS = {
    "bring": "(Tensor k, Tensor v, Tensor(a!) clock, int at) -> ()",
    "routed": "(Tensor ids, Tensor? weights, Tensor(a!) clock, int layer, str source) -> ()",
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sink, Tensor(a!) clock, int at, float? scaling, "
    "float dropout, int? sliding_window, float? softcap, str arguments) -> Tensor",
}


class Running(Protocol):
    """A model whose forward runs through a cache (host.py)."""

    @property
    def running(self) -> Any: ...

    def attention_at(self, at: int) -> nn.Module: ...


class _Current(threading.local):
    def __init__(self) -> None:
        self.hosts: list[Running] = []


_current = _Current()


def entered(host: Running) -> None:
    """A forward of it begins in this thread."""
    _current.hosts.append(host)


def left(host: Running) -> None:
    if host in _current.hosts:
        _current.hosts.remove(host)


def current() -> Running:
    if not _current.hosts:
        raise UnsupportedError(
            "compiled layers of a model with PiKV caches ran outside of a forward of their model; call the model, not its layers"
        )
    return _current.hosts[-1]


# ---- called while a compiler traces ----------------------------------------------------------------------------------------------


def bring(k: Tensor, v: Tensor, at: int) -> None:
    torch.ops.pikv_host.bring(k, v, CLOCK, at)


def routed(choice: Routed | Tensor, layer: int, source: str) -> None:
    ids, weights = (choice.ids, choice.weights) if isinstance(choice, Routed) else (choice, None)
    torch.ops.pikv_host.routed(ids.detach(), None if weights is None else weights.detach(), CLOCK, layer, source)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float,
    sliding_window: int | None, sink: Tensor | None, softcap: float | None, arguments: Sequence[str],
) -> Tensor:  # fmt: skip
    """[B, T, Hq, Dv]. arguments: names of others that are set."""
    return torch.ops.pikv_host.attention(
        query, key, value, mask, sink, CLOCK, module.layer_idx, scaling, dropout, sliding_window, softcap, " ".join(arguments)
    )


# ---- when it runs ----------------------------------------------------------------------------------------------------------------


def _bring(k: Tensor, v: Tensor, clock: Tensor, at: int) -> None:
    host = current()
    # A copy: where the model makes other keys of these, as MLA does of its latent, their memory may be used again before attention.
    host.running.forward.cache.layers[at].update(k.clone(), v.clone())
    clock.add_(1)


def _routed(ids: Tensor, weights: Tensor | None, clock: Tensor, layer: int, source: str) -> None:
    expert_ids = current().running.forward.conversation.expert_ids
    if expert_ids.source == source:  # else that of another attachment of the model
        expert_ids.heard(layer, ids.clone() if weights is None else Routed(ids.clone(), weights.clone()))
    clock.add_(1)


def answers(attend: Callable[..., Tensor]) -> None:
    """attend(module, query, key, value, mask, scaling, dropout, sliding_window, sink, softcap, arguments): the attention function."""

    def call(query, key, value, mask, sink, clock, at, scaling, dropout, sliding_window, softcap, arguments):
        clock.add_(1)
        return attend(
            current().attention_at(at), query, key, value, mask, scaling, dropout, sliding_window, sink, softcap, arguments.split()
        )

    LIBRARY.impl("attention", call, "CompositeExplicitAutograd")


for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema)
for _name, _call in (("bring", _bring), ("routed", _routed)):
    LIBRARY.impl(_name, _call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pikv_host::{_name}", lambda *args: None, lib=LIBRARY)


@torch.library.register_fake("pikv_host::attention", lib=LIBRARY)
def _fake(query, key, value, *rest):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
