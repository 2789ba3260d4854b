"""A part under Megatron-Core: the curve in every layout is that of one process. Arguments: folder, layouts tp,ep,etp."""

import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from pikv_ds.megatron_patch.train import MegatronTraining
from pikv_ds.training.fit import fit
from tests.dist.jobs.report import Report
from tests.megatron.layouts import each_layout
from tests.megatron.megatron_lm import queue_from_a_fork
from tests.training.fits import DATA, HELD, OPTIMIZING, PARTS, STEPS, Killed, alone, apart, kill, model, plan


def check_layout(report: Report, layout: str, folder: Path) -> None:
    queue_from_a_fork()
    world = parallel_state.get_data_parallel_world_size()
    expected = {name: alone(name, world) for name in PARTS}
    with report.check(f"{layout} curve") as row:
        for name, (losses, weights) in expected.items():
            own = MegatronTraining(model(name), OPTIMIZING)
            found = fit(PARTS[name], own, DATA, HELD, plan())
            now = own.weights()
            row[name] = [apart(found.curve, losses), max((now[key] - x).abs().max().item() for key, x in weights.items())]
            assert losses[-1] < losses[0] - 0.01 and max(row[name]) < 1e-5, (row, own.said)
            put = {key: x + 1 for key, x in now.items()}
            own.put(put)
            own.backward(own.loss(DATA[0], torch.Generator())["loss"] * 0, 1)
            own.step()
            assert all(torch.allclose(x, put[key], atol=0.1) for key, x in own.weights().items())
    with report.check(f"{layout} resumed") as row:
        own = folder / layout
        try:
            fit(PARTS["kv_gate"], MegatronTraining(model(), OPTIMIZING), DATA, HELD, plan(folder=own), kill)
            raise AssertionError("it was not killed")
        except Killed:
            pass
        torch.manual_seed(99)
        again = fit(PARTS["kv_gate"], MegatronTraining(model(), OPTIMIZING), DATA, HELD, plan(folder=own, resume=True))
        row["apart"] = apart(again.curve, expected["kv_gate"][0])
        assert row["apart"] < 1e-6 and len(again.curve) == STEPS, row


if __name__ == "__main__":
    each_layout(lambda report, layout: check_layout(report, layout, Path(sys.argv[1])), sys.argv[2:])
