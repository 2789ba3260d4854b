"""One rank of a recording: runs the cases named in its arguments, writes the outcome of each. Started by runner.py."""

import importlib
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from pikv_ds.errors import ConfigError, UnsupportedError
from tests.dist.jobs.report import Report
from tests.recorded.cases import CASES, Case
from tests.recorded.collectives import counted
from tests.recorded.result import outcome_of


def outcome(case: Case, group) -> dict:
    host = importlib.import_module(f"tests.recorded.host_{case.host}")  # Megatron-Core is loaded only where it is asked for
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="pikv_recorded_") as folder, counted() as collectives:
        try:
            result = host.run(case.config, case.feed, group, Path(folder))
        except (ConfigError, UnsupportedError) as error:  # on all ranks alike
            return {"refused": str(error)}
    return outcome_of(result, collectives)


def main() -> None:
    torch.set_num_threads(1)
    report = Report()
    dist.init_process_group("gloo")
    group = dist.new_group() if int(os.environ["WORLD_SIZE"]) > 1 else None
    finished = False
    try:
        for name in sys.argv[1:]:
            with report.check(name) as row:
                row["outcome"] = outcome(CASES[name], group)
        finished = True
    finally:
        if not finished:
            traceback.print_exc()
            os._exit(1)  # at once: what is left of the process groups would wait for the other ranks
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
