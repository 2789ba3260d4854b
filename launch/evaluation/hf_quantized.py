"""The quantised caches of transformers under the tasks of `pikv eval`: something to stand beside ours in one table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import QuantizedCache
from transformers.cache_utils import CacheLayerMixin

from pikv_ds.cache.stats import dense_bytes
from pikv_ds.errors import ConfigError

from .backend import Memory, Session
from .hf import DenseSession, HFBackend

PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq", "fp8": None}
BITS = {"quanto": (4, 2), "hqq": (8, 4, 3, 2, 1), "fp8": (None,)}
AXES = {"quanto": (0, -1), "hqq": (0, 1), "fp8": ()}


@dataclass(frozen=True, slots=True)
class HFCacheKind:
    """A backend of QuantizedCache, its bits and its axis; the rest are transformers' defaults (groups of 64, the last 128 tokens raw).

    axis: of keys and values, None = transformers' default, 0. hqq groups 64 elements that follow one another (axis 1), or 64 that lie
    1/64 of the tensor [B, H, L, D] apart, of other tokens, heads and requests (axis 0).
    """

    backend: str
    nbits: int | None
    axis: int | None = None

    @classmethod
    def parse(cls, text: str, option: str = "--caches") -> HFCacheKind:
        """From "quanto:4", "hqq:2", "hqq:2:1" (backend:bits:axis), "fp8". option: where the user gave it."""
        backend, *numbers = text.split(":")
        for nbits in BITS.get(backend, ()):
            for axis in (None, *AXES[backend]):
                if numbers == [str(number) for number in (nbits, axis) if number is not None]:
                    return cls(backend, nbits, axis)
        legal = [name if count is None else f"{name}:{count}" for name, counts in BITS.items() for count in counts]
        axes = "; ".join(f"{name} {' or '.join(map(str, axes))}" for name, axes in AXES.items() if axes)
        raise ConfigError(f"{option} {text!r}: legal are {', '.join(legal)}, pikv:METHOD; a third field is the axis ({axes})")

    @property
    def package(self) -> str | None:
        return PACKAGES[self.backend]

    @property
    def name(self) -> str:
        axis = "" if self.axis is None else f" axis {self.axis}"
        return f"QuantizedCache {self.backend}" + ("" if self.nbits is None else f" int{self.nbits}") + axis

    def make(self, model_config: Any) -> QuantizedCache:
        """An empty cache. Raises ImportError with the package to install."""
        options = {} if self.nbits is None else {"nbits": self.nbits}
        options |= {} if self.axis is None else {"axis_key": self.axis, "axis_value": self.axis}
        return QuantizedCache(self.backend, model_config, **options)


class BaselineBackend(HFBackend):
    """A session with a block is the quantised cache of `kind`, whatever the block; with kind None the block's own, as in HFBackend."""

    kind: HFCacheKind | None = None

    @contextlib.contextmanager
    def session(self, block: dict[str, Any] | None, rows: int, length: int) -> Iterator[Session]:
        if block is not None and self.kind is not None:
            yield QuantizedSession(self.model, self.kind.make(self.model.config), self.layers)
            return
        with super().session(block, rows, length) as session:
            yield session


class QuantizedSession(DenseSession):
    def __init__(self, model: Any, cache: QuantizedCache, layers: list) -> None:
        super().__init__(model)
        self.cache, self.layers, self.rows = cache, layers, 0

    def feed(self, ids: Tensor, *, last: bool = False) -> Tensor:
        self.rows = len(ids)
        return super().feed(ids, last=last)

    def memory(self) -> Memory:
        held = bytes_of(self.cache.layers)
        columns, itemsize = self.cache.get_seq_length(), self.model.dtype.itemsize
        dense = sum(dense_bytes(spec, self.rows, columns, itemsize) for spec in self.layers)
        return Memory(held, dense, f"{type(self.cache.layers[0]).__name__} + {self.model.config._attn_implementation}")


def bytes_of(holder: Any) -> int:
    """Bytes of the storages under a holder's tensors, each storage once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(holder)}.values())


def tensors_of(holder: Any) -> Iterator[Tensor]:
    """The plain tensors that a cache layer keeps: those in its attributes, in containers, and inside tensor subclasses."""
    if isinstance(holder, Tensor):
        inner = holder.__tensor_flatten__()[0] if hasattr(holder, "__tensor_flatten__") else []
        yield from [holder] if not inner else (tensor for name in inner for tensor in tensors_of(getattr(holder, name)))
    elif isinstance(holder, dict):
        yield from (tensor for value in holder.values() for tensor in tensors_of(value))
    elif isinstance(holder, list | tuple):
        yield from (tensor for value in holder for tensor in tensors_of(value))
    elif isinstance(holder, CacheLayerMixin):
        yield from tensors_of(vars(holder))
