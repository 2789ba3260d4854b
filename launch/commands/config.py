"""`pikv config`: the JSON schema of the "pikv" block, or a check of a file that holds one."""

from __future__ import annotations

import argparse
import json

from pikv_ds.launch.output import write_json


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("config", help='print the schema of the "pikv" block, or check a file')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--schema", action="store_true", help="print the JSON schema")
    what.add_argument("--check", metavar="FILE", help='a DeepSpeed configuration with a "pikv" block, or the block alone')


def run(args: argparse.Namespace) -> int:
    from pikv_ds.config.pikv import PiKVConfig

    if args.schema:
        schema = PiKVConfig.model_json_schema()
        print(json.dumps(schema, indent=1))
        write_json(args.json, "config", [{"schema": schema}])
        return 0
    config = PiKVConfig.parse(args.check)
    block = config.model_dump(mode="json")
    print(json.dumps({"pikv": block}, indent=1))
    write_json(args.json, "config", [{"config": block, "page_size": config.resolve_page_size()}])
    return 0
