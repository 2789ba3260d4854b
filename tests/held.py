"""Every tensor that an object keeps alive, found by walking its references: what byte counts are held to."""

import gc
from collections.abc import Iterator
from types import FunctionType, ModuleType

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import stats


def paths(*roots: object) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of all tensors that can be reached, through containers, slots and closures; not through classes and modules."""
    seen, waiting = set(), [(type(root).__name__, root) for root in roots]
    while waiting:
        path, found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield path, found
        elif isinstance(found, FunctionType):
            waiting += [(f"{path}()", cell.cell_contents) for cell in found.__closure__ or ()]
        elif isinstance(found, dict):
            waiting += [(f"{path}.{key}", value) for key, value in found.items()]
        elif not isinstance(found, (type, ModuleType, torch.device, torch.dtype)):
            waiting += [(f"{path}/{type(x).__name__}" if not isinstance(x, dict) else path, x) for x in gc.get_referents(found)]


def storages(*roots: object) -> dict[int, int]:
    """Address -> bytes of the storages behind these tensors, each once, however many views there are."""
    found = (tensor.untyped_storage() for _, tensor in paths(*roots))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def held_bytes(*roots: object, without: object = ()) -> int:
    """Bytes of what `roots` keep alive. without: what they borrow, and what it keeps alive."""
    borrowed = storages(without)
    return sum(size for address, size in storages(*roots).items() if address not in borrowed)


def check_bytes(cache: PiKVCache) -> int:
    """Between forwards every tensor is counted, and what is counted is there. Returns the bytes."""
    numbers = stats(cache, 1, 1)
    counted, held = numbers["kv_bytes_allocated"] + numbers["metadata_bytes"], held_bytes(cache, without=CacheProbe(cache).weights)
    assert counted == held, f"{counted} bytes are reported, {held} are held"
    return held
