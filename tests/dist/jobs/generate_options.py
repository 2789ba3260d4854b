"""Cases of generate() on this group: each plain and attached. args: a JSON file of [name, case] pairs, and a file for rank 0's results.

One JSON line per case: {"name", "ranks": an outcome per rank, "seconds"}; an empty file means that the first case has not ended.
"""

import json
import logging
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.dist.jobs.report import Report
from tests.generate_options.cases import run

LONGEST = timedelta(seconds=120)


def main() -> None:
    report = Report()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", timeout=LONGEST)
    rank, size = dist.get_rank(), dist.get_world_size()
    with report.check("cases") as row, Path(sys.argv[2]).open("a") as file:
        for name, case in json.loads(Path(sys.argv[1]).read_text()):
            started = time.monotonic()
            group = dist.new_group(timeout=LONGEST) if size > 1 else None
            outcome = run(case, group, rank)
            outcomes: list = [None] * size
            dist.all_gather_object(outcomes, outcome.row())
            if group is not None:
                dist.destroy_process_group(group)
            if rank == 0:
                file.write(json.dumps({"name": name, "ranks": outcomes, "seconds": round(time.monotonic() - started, 3)}) + "\n")
                file.flush()
        row["ok"] = True
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
