"""Megatron-Core itself on CPU and gloo: static decoding equals the full forward, backward reaches every parameter."""

import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext

from pikv_ds.megatron_patch import cpu_compat
from tests.dist.jobs.report import Report
from tests.megatron.models import causal_mask, positions, start, tiny_config, tiny_model, tokens

PROMPT, STEPS = 12, 4


def main() -> None:
    tp, ep, etp = map(int, sys.argv[1:4])
    report = Report()
    assert cpu_compat.install() and not cpu_compat.install()
    start(tp, ep, etp)
    model = tiny_model(tiny_config())
    ids = tokens(2, PROMPT + STEPS, seed=5 + parallel_state.get_data_parallel_rank())
    with report.check("static decoding equals the full forward") as row, torch.no_grad():
        full = model(ids, positions(ids), causal_mask(ids.shape[1]), runtime_gather_output=True)
        context = StaticInferenceContext(2, 64)
        worst, done = 0.0, 0
        while done < ids.shape[1]:
            new = PROMPT if done == 0 else 1
            piece = ids[:, done : done + new]
            mask = causal_mask(new) if done == 0 else None
            out = model(piece, positions(piece, done), mask, inference_context=context, runtime_gather_output=True)
            context.increment_sequence_len_offset(new)
            done += new
            worst = max(worst, (out[:, -1] - full[:, done - 1]).abs().max().item())
        row["difference"] = worst
        assert worst < 1e-5, worst
    if tp == 1:  # Megatron refuses to train MoE with TP and without sequence parallelism
        with report.check("backward reaches every parameter"):
            model.train()
            model(ids, positions(ids), None, labels=tokens(2, ids.shape[1], seed=9)).mean().backward()
            missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
            assert not missing, missing
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
