"""A rank of a service other than 0: does what rank 0 says, until it says stop or is gone."""

from __future__ import annotations

import sys

import torch

from .control import Control
from .load import load
from .rank import Rank
from .spec import ServeSpec
from .start import join


def main() -> None:
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
