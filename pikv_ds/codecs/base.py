"""Codec: in which format the pages of a layer store its keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from pikv_ds.ops.formats import PageFormat
from pikv_ds.spec import LayerSpec


class Codec(ABC):
    """Format of the keys and values of the layers.

    Options of a codec are keyword-only constructor arguments with defaults; they are keys of the "compression" block. The docstring of a
    codec gives its formula, its source and its bytes per token and layer.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    group: int = 0
    """Tokens that share a scale of K, so that a page must hold whole groups and a row keeps a raw tail; 0 = none do."""
    light: Codec | None = None
    """The codec of new and of important entries, when the codec keeps two kinds of pages (tiers.py)."""
    light_ratio: float = 0.0
    """Share of a request's entries that may stay in the light codec."""

    @property
    @abstractmethod
    def preferred_page_size(self) -> int:
        """Tokens per page when the configuration says null."""

    @abstractmethod
    def format_name(self, dtype: torch.dtype) -> str:
        """The record format (ops/formats.py) for a model whose keys have this dtype. Raises: ValueError for a dtype it cannot hold."""

    def page_format(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PageFormat:
        """Layout of one page of this layer; its bytes, and its declared errors `k_rel_error` and `v_rel_error`.

        Raises: ValueError for a geometry without a record: a width that is not a multiple of 8, a page that is not whole groups.
        """
        options = {"group": self.group} if self.group else {}
        return PageFormat(self.format_name(dtype), spec.num_kv_heads, spec.k_dim, spec.v_dim, page_size, latent=spec.latent, **options)

    def page_size(self, wanted: int | None) -> int:
        """Tokens per page: what the configuration says, or what the codec prefers. Raises: ValueError when that holds no whole groups."""
        page_size = wanted or self.preferred_page_size
        if self.group and page_size % self.group:
            raise ValueError(
                f"a multiple of {self.group} with pikv.compression.method = {self.name!r}, whose K scales serve {self.group} tokens; "
                f"or null, which is {self.preferred_page_size}"
            )
        return page_size
