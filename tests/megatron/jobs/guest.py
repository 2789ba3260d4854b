"""PiKV as a guest in the model: training, checkpoint keys, round trip, rewinding, moved and idle rows. Arguments: tp,ep,etp."""

import copy
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, disable_pikv, enable_pikv, pikv_layer_spec
from tests.dist.jobs.report import Report
from tests.megatron.models import local_spec, positions, start, tiny_config, tiny_model, tokens
from tests.megatron.runs import assert_conserved, decode, dense_is_forbidden, full_forward, refused, step
from tests.megatron.training import train

ROWS, LENGTH = 3, 24


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    model(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean().backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def check_round_trip(report: Report, model, ids: torch.Tensor) -> None:
    with report.check("enable and disable leave the model as it was"):
        classes = [type(m) for m in model.modules()]
        keys, full = list(model.state_dict()), full_forward(model, ids)
        attributes = [set(vars(m)) for m in model.modules()]
        static = decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [9])
        enable_pikv(model)
        assert list(model.state_dict()) == keys
        assert torch.equal(full_forward(model, ids), full)
        refused(UnsupportedError, "StaticInferenceContext", lambda: decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [9]))
        refused(UnsupportedError, "enabled already", lambda: enable_pikv(model))
        decode(model, PiKVInferenceContext(ROWS, LENGTH, model=model), ids, [9])
        disable_pikv(model)
        assert [type(m) for m in model.modules()] == classes and [set(vars(m)) for m in model.modules()] == attributes
        assert torch.equal(decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [9]), static)
        refused(UnsupportedError, "call enable_pikv", lambda: PiKVInferenceContext(ROWS, LENGTH, model=model))


def check_spec(report: Report, model, ids: torch.Tensor) -> None:
    config = model.config
    static = decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [9])
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    specs = {"layer": local_spec(config), "block": block}
    for name, spec in specs.items():
        with report.check(f"a model built from a {name} spec"):
            untouched = copy.deepcopy(spec)
            built = tiny_model(config, pikv_layer_spec(spec, {"page_size": 4}))
            assert repr(spec) == repr(untouched), "the given spec was changed"
            assert list(built.state_dict()) == list(model.state_dict())
            built.load_state_dict(model.state_dict())
            assert torch.equal(full_forward(built, ids), full_forward(model, ids))
            with dense_is_forbidden():
                logits = decode(built, PiKVInferenceContext(ROWS, LENGTH, model=built), ids, [9])
            assert (logits - static).abs().max() <= 1e-5
            disable_pikv(built)
            assert torch.equal(decode(built, StaticInferenceContext(ROWS, LENGTH), ids, [9]), static)


def check_training(report: Report, model, ids: torch.Tensor) -> None:
    with report.check("training is undisturbed, also after decoding"):
        plain = gradients(model, ids)
        enable_pikv(model)
        before = gradients(model, ids)
        context = PiKVInferenceContext(ROWS, LENGTH, model=model)
        decode(model, context, ids, [9])
        after = gradients(model, ids)
        assert all(torch.equal(plain[n], before[n]) and torch.equal(plain[n], after[n]) for n in plain)
        model.train()
        context.reset()
        refused(UnsupportedError, "train mode", lambda: step(model, context, ids[:, :9]))
        model.eval()
        disable_pikv(model)


def check_optimizer(report: Report, ids: torch.Tensor) -> None:
    """The unmodified model and one built with PiKV in its spec, from the same weights: same losses, same parameters, bit for bit."""
    with report.check("optimizer steps under DDP with the distributed optimizer"):
        config = tiny_config()
        plain, enabled = tiny_model(config), tiny_model(config, pikv_layer_spec(local_spec(config)))
        start_weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
        losses, expected = train(plain, ids, steps=2)
        own_losses, parameters = train(enabled, ids, steps=2)
        assert own_losses == losses and losses[1] < losses[0], (losses, own_losses)
        assert parameters.keys() == expected.keys() and all(torch.equal(parameters[n], expected[n]) for n in expected)
        assert not any(torch.equal(parameters[n], start_weights[n]) for n in parameters), "a parameter was not trained"
        logits = decode(enabled, PiKVInferenceContext(ROWS, LENGTH, model=enabled), ids, [9])
        assert (logits[-1] - full_forward(enabled, ids)[:, -1]).abs().max() <= 1e-5, "decoding with the trained weights"


def check_rows(report: Report, model, ids: torch.Tensor) -> None:
    for source in ("previous_layer", "true"):
        with report.check(f"tokens taken back and rows swapped, ids {source}"), torch.no_grad():
            logits = []
            for sharded in (False, True):
                context = StaticInferenceContext(ROWS, LENGTH)
                if sharded:
                    enable_pikv(model, {"page_size": 4, "storage": {"expert_ids": source}})
                    context = PiKVInferenceContext(ROWS, LENGTH, model=model)
                own = [step(model, context, ids[:, :9]), step(model, context, ids[:, 9:10]), step(model, context, ids[:, 10:13])]
                context.increment_sequence_len_offset(-2)
                own += [step(model, context, ids[:, 15:16]), step(model, context, ids[:, 16:17])]
                context.swap_key_value_dict(torch.tensor([1, 1, 2]))
                own += [step(model, context, ids[:, 17:18]), step(model, context, ids[:, 18:20])]
                logits.append(torch.stack(own))
            assert (logits[0] - logits[1]).abs().max() <= 1e-5, (logits[0] - logits[1]).abs().amax((1, 2))
            assert context.stats()["entries_cropped"] > 0 or context.core.exchange.size > 1
            disable_pikv(model)


def check_idle(report: Report, model, ids: torch.Tensor) -> None:
    with report.check("a rank that is done keeps step under idle()"):
        rank = dist.get_rank()
        working = 8 if rank == 0 else 4
        ids = ids[:, : 9 + 8]
        reference = full_forward(model, ids)
        enable_pikv(model, {"page_size": 4})
        context, worst = PiKVInferenceContext(ROWS, LENGTH, model=model), 0.0
        with torch.no_grad():
            step(model, context, ids[:, :9])
            for i in range(8):
                if i < working:
                    out = step(model, context, ids[:, 9 + i : 10 + i])
                    worst = max(worst, (out - reference[:, 9 + i]).abs().max().item())
                else:
                    with context.idle():
                        model(ids[:, :1], positions(ids[:, :1]), None, inference_context=context, runtime_gather_output=True)
        assert worst <= 1e-5, worst
        assert_conserved(context, len(model.decoder.layers) * ROWS * (9 + working))
        disable_pikv(model)


def check_modes(report: Report, model, ids: torch.Tensor) -> None:
    with report.check("a context made and run in any of torch's modes; a backward is refused"):
        reference = full_forward(model, ids)
        enable_pikv(model, {"page_size": 4})
        modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
        for made, first, later in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1)):
            with modes[made]():
                context = PiKVInferenceContext(ROWS, LENGTH, model=model)
            for again in (first, later):
                out, at = [], [9, 10, 13, 14]
                for begin, end, mode in zip([0, *at], at, (again, first, later, first), strict=False):
                    with modes[mode]():
                        out.append(step(model, context, ids[:, begin:end]))
                assert max((x - reference[:, end - 1]).abs().max().item() for x, end in zip(out, at, strict=True)) <= 1e-5
                with modes[later]():
                    context.reset()
        with torch.enable_grad():
            recorded = step(model, context, ids[:, :9])
        refused(UnsupportedError, "an inference context keeps no graph", lambda: recorded.sum().backward())
        disable_pikv(model)


def main() -> None:
    report = Report()
    cpu_compat.install()
    start(*map(int, sys.argv[1].split(",")))
    model = tiny_model(tiny_config())
    ids = tokens(ROWS, LENGTH, seed=5 + parallel_state.get_data_parallel_rank())
    check_round_trip(report, model, ids)
    check_spec(report, model, ids)
    check_training(report, model, ids)
    check_optimizer(report, ids)
    check_rows(report, model, ids)
    check_idle(report, model, ids)
    check_modes(report, model, ids)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
