"""What a rank was started with and as. args: any."""

import os
import random
import sys

import torch

from tests.dist.jobs.report import Report

with Report().check("started") as row:
    row |= {
        "arguments": sys.argv[1:],
        "path": sys.path[0],
        "main": sys.modules["__main__"].__file__,
        "environment": dict(os.environ),
        "leads": os.getsid(0) == os.getpid(),
        "hash": hash("a set of strings"),
        "drawn": random.random(),
        "seed": torch.initial_seed(),
        "left": getattr(torch, "left_behind", None),
        "input": sys.stdin.read(),
    }
torch.left_behind = row["rank"]
torch.manual_seed(row["rank"])
print("printed by", row["rank"])
sys.exit(4 if row["rank"] == 1 else None)
