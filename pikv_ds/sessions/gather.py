"""The copies of all ranks as one, on the first rank. G ranks."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from pikv_ds.errors import PeerError
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.migration.wire import Unpacked, packed, swap

from .rows import RowsCopy

WHAT = "saving a session"


def gathered(exchange: Exchange, copy: RowsCopy, device: torch.device) -> RowsCopy | None:
    """The tensors of all ranks' shards with those that every rank has, on the host; None on ranks but the first.

    Collectives: three with several ranks, none with one. Raises: PeerError, on all ranks, when the first has no memory for them.
    """
    if exchange.size == 1:
        return _on_host(copy)
    own = {} if exchange.rank == 0 else copy.of_shards()
    nothing = torch.zeros(0, dtype=torch.uint8, device=device)
    blocks = [_block(own, device) if own else nothing, *[nothing] * (exchange.size - 1)]
    received = swap(exchange, blocks, [], device, WHAT).blocks
    if received is None:
        raise PeerError("a rank has no memory for the session of all ranks, which is put together on the first one; nothing was written")
    if exchange.rank:
        return None
    tensors = dict(copy.tensors)
    for block in received:
        tensors |= _tensors(block) if len(block) else {}
    return _on_host(copy._replace(tensors=tensors))


def _on_host(copy: RowsCopy) -> RowsCopy:
    return copy._replace(tensors={name: x.detach().to("cpu").contiguous() for name, x in copy.tensors.items()})


def _block(tensors: dict[str, Tensor], device: torch.device) -> Tensor:
    """uint8: how long the list of names is, names with shapes and types as JSON, the tensors."""
    listed = [[name, list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in tensors.items()]
    text = torch.frombuffer(bytearray(json.dumps(listed).encode()), dtype=torch.uint8).to(device)
    return packed([torch.tensor([len(text)], device=device), text, *tensors.values()], device)


def _tensors(block: Tensor) -> dict[str, Tensor]:
    read = Unpacked(block)
    (length,) = read.take((1,), torch.int64).tolist()
    listed = json.loads(bytes(read.take((length,), torch.uint8).tolist()))
    found = {name: read.take(shape, getattr(torch, dtype)) for name, shape, dtype in listed}
    read.end()
    return found
