"""A rank of a service other than 0: does what rank 0 says, until it says stop or is gone."""

from __future__ import annotations

import os
import sys
import threading
import time

import torch

from .control import Control
from .load import load
from .rank import Rank
from .spec import ServeSpec
from .start import join


def end_with(parent: int) -> None:
    """Rank 0 is the parent. In a collective its end is noticed at once, but not while a model loads or an op is compiled."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    port, spec = int(sys.argv[1]), ServeSpec.from_json(sys.argv[2])
    torch.set_num_threads(spec.threads)
    join(port, spec)
    rank = Rank(load(spec))
    control = Control(spec.timeout_s)
    while not (plan := control.listen()).stop:
        control.answer(rank.run(plan))
    rank.runner.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
