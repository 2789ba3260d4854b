"""One all-reduce over gloo, then end as told: ok, fail (rank 0 asserts), die (rank 1 exits 3), hang (with a child)."""

import subprocess
import sys
import time

import torch
import torch.distributed as dist

from tests.dist.jobs.report import Report

mode = next(arg for arg in sys.argv[1:] if not arg.startswith("--"))
report = Report()
dist.init_process_group("gloo")
with report.check("sum") as row:
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    row["total"] = total.item()
with report.check("assertion"):
    assert mode != "fail" or dist.get_rank() != 0, "rank 0 was told to fail"
if mode == "die" and dist.get_rank() == 1:
    sys.exit(3)
if mode == "hang":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "pikv-ping-child"])
    time.sleep(600)
dist.barrier()
dist.destroy_process_group()
