"""The frame of a job: its report, the CPU aid, and one layout of process groups after the other."""

import sys
from collections.abc import Callable, Sequence

import torch.distributed as dist
from megatron.core import parallel_state

from pikv_ds.megatron_patch import cpu_compat
from tests.dist.jobs.report import Report
from tests.megatron.models import start


def each_layout(check: Callable[[Report, str], None], layouts: Sequence[str] | None = None) -> None:
    """check(report, layout) with the process groups of every layout "tp,ep,etp" or "tp,ep,etp,pp"; None: all arguments of the job."""
    report = Report()
    cpu_compat.install()
    for layout in sys.argv[1:] if layouts is None else layouts:
        start(*map(int, layout.split(",")))
        check(report, layout)
        dist.barrier()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
