"""`pikv config`: the JSON schema of the "pikv" block, what does not combine in it, or a check of a file that holds one."""

from __future__ import annotations

import argparse
import json

from pikv_ds.launch.output import print_table, write_json


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("config", help='print the schema of the "pikv" block or its rules, or check a file')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--schema", action="store_true", help="print the JSON schema")
    what.add_argument("--rules", action="store_true", help="print what does not combine, why, and what to use instead")
    what.add_argument("--check", metavar="FILE", help='a DeepSpeed configuration with a "pikv" block, or the block alone')


def run(args: argparse.Namespace) -> int:
    from pikv_ds.config.pikv import PiKVConfig

    if args.schema:
        schema = PiKVConfig.model_json_schema()
        print(json.dumps(schema, indent=1))
        write_json(args.json, "config", [{"schema": schema}])
        return 0
    if args.rules:
        rows = rule_rows()
        for moment in dict.fromkeys(row["refused"] for row in rows):
            print_table(f"refused {moment}", [{k: v for k, v in row.items() if k != "refused"} for row in rows if row["refused"] == moment])
        write_json(args.json, "config", rows)
        return 0
    config = PiKVConfig.parse(args.check)
    block = config.model_dump(mode="json")
    print(json.dumps({"pikv": block}, indent=1))
    write_json(args.json, "config", [{"config": block, "page_size": config.resolve_page_size()}])
    return 0


def rule_rows() -> list[dict[str, str]]:
    """A row per rule, in the order in which they are asked."""
    from pikv_ds.blueprint.rules import RULES

    moments = {"block": "when the block is read", "model": "when a cache is built for a model and its ranks"}
    return [
        {
            "refused": moments[rule.looks_at],
            "rule": rule.name,
            "blocks": ", ".join(rule.blocks),
            "not": rule.refuses,
            "because": rule.why,
            "instead": rule.instead,
        }
        for rule in RULES
    ]
