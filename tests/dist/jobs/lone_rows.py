"""Rows beside each other on several ranks, and each alone in a cache of one rank. args: a check each, "who/scene/requests"."""

import sys
import tempfile
from pathlib import Path

import torch.distributed as dist

from tests.dist.jobs.report import Report
from tests.harness.lone_rows import SCENES, Rows
from tests.retention.test_rows_alone import MADE

FOLDER = tempfile.TemporaryDirectory()


def check(report: Report, what: str, group) -> None:
    """Distinct requests: every rank has tokens of its own."""
    kind, name, scene, requests = what.split("/")
    make = next(make for make, _ in MADE if make.__name__ == kind)
    with report.check(what):
        kinds, config = make(name, Path(FOLDER.name))
        config = config | {"storage": config["storage"] | {"requests": requests, "num_shards": max(2, config["storage"]["num_shards"])}}
        rows = Rows(kinds, config, group, streams=100 * dist.get_rank() if requests == "distinct" else 0)
        SCENES[scene](rows)
        found = rows.differences()
        assert found == [], found


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    for what in (arg for arg in sys.argv[1:] if "/" in arg and not arg.startswith("--")):
        check(report, what, dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
