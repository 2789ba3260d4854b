"""Tensor operations of the cache, one public function per file. Each has a plain torch version, which is the reference of the compiled ones."""

from .append import append
from .checksum import checksum
from .decode import decode
from .formats import PageFormat
from .merge import merge
from .merge_partials import add_sink, merge_partials
from .migrate import migrate
from .paged_attention import paged_attention
from .prefill_cached import prefill_cached
from .ref_formats import new_pages, views
from .sdpa_lse import sdpa_lse

__all__ = [
    "PageFormat",
    "add_sink",
    "append",
    "checksum",
    "decode",
    "merge",
    "merge_partials",
    "migrate",
    "new_pages",
    "paged_attention",
    "prefill_cached",
    "sdpa_lse",
    "views",
]
