"""`torchrun -m pikv_ds.launch.megatron_eval`: the old place of launch/jobs/megatron_eval.py, which its callers keep."""

import sys

from pikv_ds.launch.jobs.megatron_eval import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
