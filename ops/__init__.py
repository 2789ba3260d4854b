"""Tensor operations of the cache, one public function per file.

Each has a plain torch version: the reference that every compiled version is checked against.
"""

from pikv_ds.ops.build import load as _load  # noqa: F401 the ops ask it for their compiled versions
from pikv_ds.ops.build.builder import register, unregister
from pikv_ds.ops.format.bound_codes import bounds_shape
from pikv_ds.ops.format.formats import PageFormat
from pikv_ds.ops.reference.formats import decode_pages, new_pages, positions, views
from pikv_ds.ops.reference.merge_partials import add_sink, merge_partials
from pikv_ds.ops.reference.paged_attention import paged_attention
from pikv_ds.ops.reference.sdpa_lse import sdpa_lse

from .append import append
from .assign_slots import assign_slots
from .checksum import checksum
from .choose_pages import choose_pages
from .crc32 import crc32
from .decode import decode
from .gather_sections import gather_sections
from .merge import merge
from .migrate import migrate
from .pack import pack, record_layout, unpack
from .page_bounds import page_bounds
from .page_score import page_score
from .prefill_cached import prefill_cached
from .read_file import read_file
from .route import route_bytes, route_merge, route_pack, route_unpack
from .stage import Staged, Staging, stage
from .stage_ahead import stage_ahead

__all__ = [
    "PageFormat",
    "Staged",
    "Staging",
    "add_sink",
    "append",
    "assign_slots",
    "bounds_shape",
    "checksum",
    "choose_pages",
    "crc32",
    "decode",
    "decode_pages",
    "gather_sections",
    "merge",
    "merge_partials",
    "migrate",
    "new_pages",
    "pack",
    "page_bounds",
    "page_score",
    "paged_attention",
    "positions",
    "prefill_cached",
    "read_file",
    "record_layout",
    "register",
    "route_bytes",
    "route_merge",
    "route_pack",
    "route_unpack",
    "sdpa_lse",
    "stage",
    "stage_ahead",
    "unpack",
    "unregister",
    "views",
]
