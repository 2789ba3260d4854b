"""`pikv methods`: every registered codec, router and retention policy, from the registries."""

from __future__ import annotations

import argparse
import inspect
from typing import TYPE_CHECKING, Any

from pikv_ds.launch.output import print_table, write_json

if TYPE_CHECKING:
    from pikv_ds.codecs.base import Codec

_CODEC_COLUMNS = ("page_size", "bytes_per_token", "k_error_bound", "v_error_bound")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    subparsers.add_parser("methods", help="list codecs, routers and retention policies")


def run(args: argparse.Namespace) -> int:
    rows = method_rows()
    for key in dict.fromkeys(row["key"] for row in rows):
        own = [row for row in rows if row["key"] == key]
        columns = [name for name in own[0] if name != "key" and any(row[name] is not None for row in own)]
        print_table(key, [{name: row[name] for name in columns} for row in own])
    write_json(args.json, "methods", rows)
    return 0


def method_rows() -> list[dict[str, Any]]:
    """One row per method: its key in the "pikv" block, its options, what it does; for codecs also bytes and declared errors."""
    from pikv_ds.codecs import CODECS
    from pikv_ds.policies import POLICIES
    from pikv_ds.routers import ROUTERS

    rows = []
    for key, registry in (("compression", CODECS), ("routing", ROUTERS), ("scheduling", POLICIES)):
        for name, method in registry.items():
            parameters = inspect.signature(method.__init__).parameters.values()
            options = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters if p.kind is p.KEYWORD_ONLY]
            size = _codec_columns(method) if key == "compression" else dict.fromkeys(_CODEC_COLUMNS)
            rows.append(
                {
                    "key": f"{key}.method",
                    "name": name,
                    "options": ", ".join(options),
                    **size,
                    "what": inspect.getdoc(method).splitlines()[0],
                }
            )
    return rows


def _codec_columns(method: type[Codec]) -> dict[str, Any]:
    """For bf16 keys and values of 8 heads x 128, a page without its raw tail. Calibrated codecs: at half the width, or the least that they
    need for random numbers; their errors depend on the model (`pikv calibrate` says them)."""
    import torch

    from pikv_ds.codecs.base import Heads
    from pikv_ds.spec import LayerSpec

    draw = lambda heads: torch.randn(256, heads, 128, generator=torch.Generator().manual_seed(heads))  # noqa: E731
    codec = method.example([Heads(draw(32), draw(8), draw(8))])
    page_size, spec = codec.page_size(None), LayerSpec(layer_idx=0, num_kv_heads=8, k_dim=128, v_dim=128)
    fmt = codec.page_format(spec, page_size, torch.bfloat16)
    errors = [None if codec.calibrated else round(error, 4) for error in codec.declared_errors(spec, page_size, torch.bfloat16)]
    return dict(zip(_CODEC_COLUMNS, (page_size, fmt.bytes_per_token, *errors), strict=True))
