"""Tensor operations of the cache, one public function per file, each in plain torch:
the reference that every compiled version is checked against."""

from .merge_partials import add_sink, merge_partials
from .paged_attention import paged_attention
from .sdpa_lse import sdpa_lse

__all__ = ["add_sink", "merge_partials", "paged_attention", "sdpa_lse"]
