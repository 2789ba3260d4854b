"""The quantised caches of transformers under the tasks of `pikv eval`: something to stand beside ours in one table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import QuantizedCache
from transformers.cache_utils import CacheLayerMixin

from pikv_ds.errors import ConfigError
from pikv_ds.stats import dense_bytes

from .backend import Memory
from .hf import HFBackend, _Dense
from .spec import EvalSpec

PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq", "fp8": None}
BITS = {"quanto": (4, 2), "hqq": (8, 4, 3, 2, 1), "fp8": (None,)}


@dataclass(frozen=True, slots=True)
class HFCacheKind:
    """A backend of QuantizedCache and its bits; the rest are transformers' defaults (groups of 64, the last 128 tokens raw)."""

    backend: str
    nbits: int | None

    @classmethod
    def parse(cls, text: str) -> HFCacheKind:
        """From "quanto:4", "hqq:2", "fp8"."""
        backend, _, bits = text.partition(":")
        nbits = int(bits) if bits.isdigit() else None
        if backend not in BITS or nbits not in BITS[backend] or (bits and nbits is None):
            legal = [name if count is None else f"{name}:{count}" for name, counts in BITS.items() for count in counts]
            raise ConfigError(f"--caches {text!r}: legal are {', '.join(legal)}")
        return cls(backend, nbits)

    @property
    def package(self) -> str | None:
        return PACKAGES[self.backend]

    @property
    def name(self) -> str:
        return f"QuantizedCache {self.backend}" + ("" if self.nbits is None else f" int{self.nbits}")

    def make(self, model_config: Any) -> QuantizedCache:
        """An empty cache. Raises ImportError with the package to install."""
        options = {} if self.nbits is None else {"nbits": self.nbits}
        return QuantizedCache(self.backend, model_config, **options)


class QuantizedBackend(HFBackend):
    """A session with a block is transformers' quantised cache, whatever the block; without one the dense cache, as in HFBackend."""

    def __init__(self, spec: EvalSpec, kind: HFCacheKind) -> None:
        super().__init__(spec, 300)
        self.kind = kind

    @contextlib.contextmanager
    def session(self, block: dict[str, Any] | None, rows: int, length: int) -> Iterator[_Dense]:
        session = _Dense(self.model)
        if block is not None:
            session = _Quantized(self.model, self.kind.make(self.model.config), self.layers)
        yield session


class _Quantized(_Dense):
    def __init__(self, model: Any, cache: QuantizedCache, layers: list) -> None:
        super().__init__(model)
        self.cache, self.layers, self.rows = cache, layers, 0

    def feed(self, ids: Tensor) -> Tensor:
        self.rows = len(ids)
        return super().feed(ids)

    def memory(self) -> Memory:
        held = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for layer in self.cache.layers for tensor in tensors_of(layer)}
        columns, itemsize = self.cache.get_seq_length(), self.model.dtype.itemsize
        dense = sum(dense_bytes(spec, self.rows, columns, itemsize) for spec in self.layers)
        return Memory(sum(held.values()), dense, f"{type(self.cache.layers[0]).__name__} + {self.model.config._attn_implementation}")


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
