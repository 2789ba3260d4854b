"""A rank of two kills itself, with DeepSpeed started or with an engine besides. Argument: which."""

import os
import signal
import sys

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
