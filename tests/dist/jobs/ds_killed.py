"""A rank of two kills itself, with DeepSpeed started or with an engine besides. Argument: which.

"killed under our launcher": this very script, started by launch/run.py in this process.
"""

import os
import signal
import sys

if sys.argv[1:] == ["killed under our launcher"]:
    from pikv_ds.launch import run

    sys.argv = ["run", __file__, "killed before an engine"]
    run.main()

import deepspeed
import torch.distributed as dist

import pikv_ds
from tests.dist.jobs.ds_compare import MICRO
from tests.dist.jobs.report import Report
from tests.tiny_models import tiny_model

report = Report()
with report.check("started") as row:
    deepspeed.init_distributed()
    if sys.argv[1] == "killed with an engine":
        engine = pikv_ds.initialize(model=tiny_model("qwen3_dense"), config={**MICRO, "pikv": {}})[0]
    dist.barrier()
    row["names"] = [name for name in os.listdir("/dev/shm") if f"_{os.environ['MASTER_PORT']}_" in name]
    dist.barrier()
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
