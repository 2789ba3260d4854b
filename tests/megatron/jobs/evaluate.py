"""`python -m pikv_ds.launch.jobs.megatron_eval` on a rank that has the variables of torchrun. Arguments: those of the module."""

import sys

from pikv_ds.launch.jobs.megatron_eval import main

if __name__ == "__main__":
    sys.exit(main())
