"""`pikv methods`: every registered codec, router and retention policy, from the registries."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from pikv_ds.launch.output import print_table, write_json


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    subparsers.add_parser("methods", help="list codecs, routers and retention policies")


def run(args: argparse.Namespace) -> int:
    rows = method_rows()
    print_table("Methods", rows)
    write_json(args.json, "methods", rows)
    return 0


def method_rows() -> list[dict[str, Any]]:
    """One row per method: its name, its key in the "pikv" block, what it does; for codecs also size and error."""
    from pikv_ds.codecs import CODECS
    from pikv_ds.policies import POLICIES
    from pikv_ds.routers import ROUTERS

    rows = []
    for key, registry in (("compression", CODECS), ("routing", ROUTERS), ("scheduling", POLICIES)):
        for name, method in registry.items():
            rows.append(
                {
                    "key": f"{key}.method",
                    "name": name,
                    "page_size": getattr(method, "preferred_page_size", None),
                    "max_rel_error": getattr(method, "max_rel_error", None),
                    "what": inspect.getdoc(method).splitlines()[0],
                }
            )
    return rows
