"""A part under Megatron-Core: the curve in every layout is that of one process. Arguments: folder, layouts tp,ep,etp."""

import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from pikv_ds.adapters.hf.record import Recorder
from pikv_ds.megatron_patch import cpu_compat
from pikv_ds.megatron_patch.hf_config import build_gpt
from pikv_ds.megatron_patch.hf_weights import load_hf_weights
from pikv_ds.megatron_patch.record import MegatronRecorder
from pikv_ds.megatron_patch.train import MegatronTraining
from pikv_ds.training.fit import fit
from tests.dist.jobs.report import Report
from tests.megatron.layouts import each_layout
from tests.megatron.megatron_lm import queue_from_a_fork
from tests.tiny_models import prompt, tiny_model
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
    with report.check(f"{layout} windows") as row:  # of the model in Megatron-Core, beside those of transformers
        cpu_compat.install()
        hf, ids = tiny_model("qwen3_moe"), torch.stack([prompt(24, seed=i)[0] for i in range(2)])
        whole = Recorder(hf, ids)
        model_ = build_gpt(hf.config, max_sequence_length=24, **cpu_compat.cpu_config_options()).eval()
        load_hf_weights(model_, hf.config, hf.state_dict())
        spread = MegatronRecorder(model_, whole.layers, ids)
        row["apart"] = 0.0
        for index in (0, parallel_state.get_data_parallel_rank()):  # the second time one rank may have kept its own
            for own, expected in zip(spread[index].layers, whole[index].layers, strict=True):
                assert own.scale == expected.scale
                far = (getattr(own, name) - getattr(expected, name) for name in ("q", "k", "v", "hidden"))
                row["apart"] = max(row["apart"], *(x.abs().max().item() for x in far))
        pairs = zip(spread.fingerprint(), whole.fingerprint(), strict=True)
        assert row["apart"] < 1e-5 and all(torch.allclose(a, b) for a, b in pairs), row


if __name__ == "__main__":
    each_layout(lambda report, layout: check_layout(report, layout, Path(sys.argv[1])), sys.argv[2:])
