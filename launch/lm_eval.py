"""`python -m pikv_ds.launch.lm_eval`: the old place of launch/evaluation/lm_eval.py, which its callers keep."""

import sys

from pikv_ds.launch.evaluation.lm_eval import main, register

__all__ = ["main", "register"]

if __name__ == "__main__":
    sys.exit(main())
