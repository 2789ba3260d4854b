"""A service over ranks: rank 0 is under load by the openai client, the others follow. Rows of the load generator are checked."""

import asyncio
import os

import torch.distributed as dist

from pikv_ds.launch.bench import serve as load_generator
from pikv_ds.launch.cli import build_parser
from pikv_ds.launch.serving.control import Control
from pikv_ds.launch.serving.load import load
from pikv_ds.launch.serving.rank import Rank
from tests.dist.jobs.report import Report
from tests.serving.live import engine_of, served, spec_of

LOAD = ["--requests", "12", "--at-once", "4", "--longest-prompt", "80", "--longest-answer", "8", "--shared", "0.8"]


def follow(spec) -> int:
    """As follow.py does, counting the steps in which this rank had nothing to run."""
    rank, idle = Rank(load(spec)), 0
    control = Control(spec.timeout_s)
    while not (plan := control.listen()).stop:
        held = {*rank._sequences, *(new.number for new in plan.new if new.rank == rank.runner.data_rank)}
        idle += plan.forward and not any(number in held for number, _ in plan.pieces)
        control.answer(rank.run(plan))
    rank.runner.close()
    return idle


def main() -> None:
    dist.init_process_group("gloo")
    report, size = Report(), dist.get_world_size()
    arguments = os.environ.get("PIKV_SERVE_ARGUMENTS", "").split()
    spec = spec_of("--ranks", str(size), "--max-length", "256", *arguments, timeout_s=60.0)
    with report.check("load") as row:
        if dist.get_rank():
            row["idle"] = follow(spec)
            return
        with engine_of(spec) as engine, served(engine) as url:
            args = build_parser().parse_args(["bench", "serve", "--url", url, *LOAD])
            asked = load_generator.make_load(args)
            seconds = asyncio.run(load_generator.send_all(args, asked))
            row |= load_generator.summary(args, asked, seconds) | load_generator.compare(args, asked)
            row["reused"] = engine.scheduler.found
        assert (row["lost"], row["wrong"]) == (0, 0), row
        assert row["reused"] > 0


if __name__ == "__main__":
    main()
