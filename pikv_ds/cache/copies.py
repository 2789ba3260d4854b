"""Copies of a cache's rows: into another cache of the same model, into a file, and from a file into a cache on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import SessionError, UnsupportedError
from pikv_ds.exchange.digest import digest
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.migration.migration import Migration
from pikv_ds.modes import eager
from pikv_ds.pages.layers import RankPages
from pikv_ds.sessions import file
from pikv_ds.sessions.gather import gathered
from pikv_ds.sessions.rows import RowsCopy, check, copied, put
from pikv_ds.spec import LayerSpec
from pikv_ds.step.agreement import Agreement

from .alike import alike

HOST = "host "  # tensors of the host's own, in a file
DECIDES = ("pikv.compression", "pikv.scheduling", "pikv.routing.method", "pikv.page_size", "pikv.pools", "layer ", "experts", "dtype")
"""Of what caches are made of: what must be the same in a cache that goes on with a session. Where entries lie need not be."""
NOT_NOW = {
    1: "a forward runs; save, load and fork between forwards",
    2: "tokens of the last forward may still be taken back (a crop is announced); do it outside of assisted generation",
    3: "shards are changing ranks beside the forwards; wait until they have, or call cancel_rebalance()",
    4: "the ranks have requests of their own (pikv.storage.requests = 'distinct'), whose rows are numbered by rank; use 'replicated'",
    5: "the codec fits a basis to each request, which lies at its own rank; use a codec that is the same for all ('none', 'int8', 'lora')",
    6: "it has not seen a forward, so there is nothing to copy; run the prompt first",
    7: "some of its pages lie in slower tiers (pikv.offload.device_gib), where a copy does not reach; leave offload out",
    8: "shards have copies on further ranks; call rebalance() with one rank for each shard first",
}


class Core(Protocol):
    """The cache (cache.py)."""

    layers: list[LayerSpec]
    config: PiKVConfig
    dtype: torch.dtype
    device: torch.device
    num_shards: int
    exchange: Exchange
    agreement: Agreement
    pages: RankPages
    migration: Migration
    bases: Any
    local: Any
    counting: tuple[Any, ...]
    hold_margin: int | None

    @property
    def num_experts(self) -> int: ...
    def reset(self) -> None: ...
    def begin_rows(self, num_rows: int) -> None: ...
    def rebalance(self, holders: Sequence[Sequence[int]] | None = None) -> bool: ...


class HostPart(NamedTuple):
    """What a host keeps of the rows beside the cache's own: tensors by name, and what JSON can say."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


@eager
def fork(cache: Core, target: Core) -> None:
    """All rows, parked ones behind the others, take the place of what `target` holds, a cache that is made alike; its shards lie where
    those of `cache` do from now on. All ranks at the same point, between forwards.

    Sync: reads sizes back. Collectives: two frames, and those of a rebalance where shards lie elsewhere. Raises, on all ranks:
    UnsupportedError with the reason.
    """
    _refuse(cache, "be copied", _reason(cache, begun=True))
    _refuse(target, "be replaced", _reason(target, begun=False))
    target.reset()
    if target.pages.map.holders != cache.pages.map.holders:
        target.rebalance(cache.pages.map.holders)
    copy = _copied(cache)
    check(target.pages, copy)
    _put(target, copy)


@eager
def save(cache: Core, path: str | Path, host: HostPart) -> int:
    """Write all rows to a file, on the first rank. All ranks at the same point, between forwards, with equal arguments.

    Returns: bytes of the file, on all ranks. Sync: reads everything back. Collectives: two frames, and three records on several ranks.
    Raises, on all ranks: UnsupportedError with the reason, SessionError where it could not be written; PeerError.
    """
    _refuse(cache, "be saved", _reason(cache, begun=True))
    with cache.exchange.together():
        whole = gathered(cache.exchange, _copied(cache), cache.device)
    size, failed = 0, None
    if whole is not None:
        tensors = whole.tensors | {HOST + name: x.detach().to("cpu").contiguous() for name, x in host.tensors.items()}
        about = {"rows": whole.about, "facts": _facts(cache), "num_shards": cache.num_shards, "host": host.about}
        try:
            size = file.write(path, tensors, about)
        except OSError as error:
            failed = error
    size = cache.exchange.gather_ints([size], cache.device, "saving a session: written")[0][0]
    if not size:
        raise SessionError(f"{str(path)!r} could not be written on the first rank{f': {failed.strerror}' if failed else ''}") from failed
    return size


@eager
def load(cache: Core, path: str | Path, fits: Callable[[HostPart], None]) -> HostPart:
    """The rows of a file take the place of what the cache holds. All ranks at the same point; each reads the file.

    fits: the host's own check, raises SessionError. Returns: the host's part. Collectives: two frames.
    Raises, on all ranks, before anything changes: SessionError, UnsupportedError with the reason; PeerError.
    """
    _refuse(cache, "be replaced", _reason(cache, begun=False))
    failed: SessionError | None = None
    mark, copy, host = 0, None, None
    try:
        tensors, about = file.read(path)
        own = {name: x for name, x in tensors.items() if not name.startswith(HOST)}
        copy = RowsCopy(own, about["rows"])
        host = HostPart({name.removeprefix(HOST): x for name, x in tensors.items() if name.startswith(HOST)}, about["host"])
        _check_facts(cache, about, str(path))
        check(cache.pages, copy)
        fits(host)
        mark = 1 + digest([torch.tensor(copy.lens), *(x for _, x in sorted(own.items()))]) // 2
    except KeyError as error:
        failed = SessionError(f"{str(path)!r} has no {error}; save the session again")
    except SessionError as error:
        failed = error
    marks = [row[0] for row in cache.exchange.gather_ints([mark], cache.device, "loading a session")]
    if failed is not None:
        raise failed
    if 0 in marks:
        raise SessionError(f"rank {marks.index(0)} could not take {str(path)!r}; see what it says")
    if len(set(marks)) > 1:
        raise SessionError(f"{str(path)!r} is not the same file on all ranks; copy it to each of them, or give a path that they share")
    assert copy is not None and host is not None, "it was read"
    _put(cache, copy)
    return host


def _put(cache: Core, copy: RowsCopy) -> None:
    cache.reset()
    cache.begin_rows(len(copy.lens))
    cache.agreement.take_over(copy.lens)
    put(cache.pages, copy)


def _copied(cache: Core) -> RowsCopy:
    cache.pages.room.check_last()
    return copied(cache.pages, cache.agreement.lens + cache.agreement.parked_lens)


def _reason(cache: Core, *, begun: bool) -> int:
    """Of NOT_NOW; 0: none."""
    if cache.local is not None:
        return 1
    if cache.hold_margin is not None or any(part.waiting for part in cache.counting):
        return 2
    if cache.migration.wanted is not None or cache.migration.in_doubt is not None:
        return 3
    if cache.exchange.size > 1 and "distinct" in (cache.agreement.mode, cache.config.storage.requests):
        return 4
    if cache.bases is not None:
        return 5
    if cache.config.offload.enabled:
        return 7
    if cache.pages.map.copied:
        return 8
    return 6 if begun and cache.agreement.mode is None else 0


def _refuse(cache: Core, what: str, reason: int) -> None:
    said = cache.exchange.gather_ints([reason], cache.device, f"rows of a cache are to {what}")
    if worst := max(row[0] for row in said):
        raise UnsupportedError(f"the rows of this cache can't {what} now: {NOT_NOW[worst]}")


def _facts(cache: Core) -> dict[str, str]:
    pairs = alike(cache.config, cache.layers, cache.num_experts, cache.dtype, None, cache.device)
    return {name: value for name, value in pairs if name.startswith(DECIDES)}


def _check_facts(cache: Core, about: Mapping[str, Any], path: str) -> None:
    if about["num_shards"] != cache.num_shards:
        raise SessionError(
            f"{path!r} has {about['num_shards']} shards per layer, this cache {cache.num_shards}: set pikv.storage.num_shards = "
            f"{about['num_shards']}, and for other numbers of ranks save with a multiple of all of them"
        )
    own, saved = _facts(cache), about["facts"]
    for name in sorted(own.keys() | saved.keys()):
        if own.get(name) != saved.get(name):
            raise SessionError(
                f"{path!r} was saved with {name} = {saved.get(name, 'not there')}, this cache has {own.get(name, 'not there')}: make the "
                f"cache as it was, or run the tokens again"
            )
