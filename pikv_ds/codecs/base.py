"""Codec: the storage format of a page. Shape notes: T entries, H KV heads, Dk and Dv their key and value widths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Field(NamedTuple):
    """Shape of one stored field per token, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Codec(ABC):
    """Format of the keys and values of one layer.

    A latent layer (MLA) stores its values as the first columns of its keys: there Dv is 0 and `v` has no columns.
    Options of a codec are keyword-only constructor arguments with defaults. The docstring of a codec gives its formula,
    its source and its bytes per token and layer.
    """

    name: ClassVar[str]
    preferred_page_size: ClassVar[int]
    max_rel_error: ClassVar[float]
    """Largest ||x - decode(encode(x))|| / ||x|| over keys, and over values; tested by tests/contracts."""

    @abstractmethod
    def bytes_per_token(self, num_kv_heads: int, k_dim: int, v_dim: int, itemsize: int) -> int:
        """Bytes of one stored entry of one layer, scales included, its int32 position not included.

        `itemsize` is the size of one element of the model's KV dtype.
        """

    @abstractmethod
    def fields(self, num_kv_heads: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> dict[str, Field]:
        """What is stored per token: name -> shape and dtype. Their bytes add up to `bytes_per_token`."""

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """k [T, H, Dk], v [T, H, Dv] -> stored fields, each with T rows."""

    @abstractmethod
    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of `encode`, within `max_rel_error`: fields -> k [T, H, Dk], v [T, H, Dv]."""
