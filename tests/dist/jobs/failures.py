"""What goes wrong between ranks, and that all of them say so: diverging ranks, full shards, refusals. args: case (all | dies | hangs)."""

import os
import sys
import time

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.hf.anatomy import find_attentions
from pikv_ds.errors import CapacityError, DivergedError, PeerError, UnsupportedError
from tests.adapters.test_probe import LengthAttention
from tests.dist.jobs.exact import assert_same, generate
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model


def expect(error: type[Exception], *words: str):
    class Expecting:
        def __enter__(self):
            return self

        def __exit__(self, kind, value, traceback):
            assert kind is not None, f"no {error.__name__} was raised"
            if not issubclass(kind, error):
                return False
            missing = [word for word in words if word not in str(value)]
            assert not missing, f"{missing} not in: {value}"
            return True

    return Expecting()


def check_divergence(report: Report, model, group) -> None:
    rank = dist.get_rank()
    ids = prompt(12, seed=3)
    with report.check("replicated ranks that sample differently stop, all of them"):
        with pikv_ds.attach(model, {}, group):
            torch.manual_seed(1000 + rank)
            with expect(DivergedError, "distinct", "seed", "rank 0", "rank 1"):
                model.generate(ids, max_new_tokens=40, do_sample=True, temperature=5.0, eos_token_id=None)
    with report.check("sampling alike on all ranks is fine"):
        torch.manual_seed(7)
        reference = model.generate(ids, max_new_tokens=20, do_sample=True, eos_token_id=None)
        with pikv_ds.attach(model, {}, group):
            torch.manual_seed(7)
            assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=True, eos_token_id=None), reference)
    with report.check("declared replicated, but the prompts differ"):
        with pikv_ds.attach(model, {"storage": {"requests": "replicated"}}, group), expect(DivergedError, "distinct"):
            generate(model, prompt(12, seed=3 + rank), new_tokens=4)
    with report.check("replicated decode against a longer forward of another rank"), torch.no_grad():
        with pikv_ds.attach(model, {}, group) as cache, expect(DivergedError, "rank 1"):
            model(ids)
            model(ids[:, : 1 + rank], past_key_values=cache)
    with report.check("the model works again afterwards"):
        reference = generate(model, ids, new_tokens=8)
        with pikv_ds.attach(model, {}, group):
            assert_same(generate(model, ids, new_tokens=8), reference, 1e-5)


def check_capacity(report: Report, model, group) -> None:
    size = dist.get_world_size()
    ids = prompt(40, seed=4)
    with report.check("overflow error: a shard is full"):
        config = {"storage": {"capacity_tokens": 30, "overflow": "error", "placement": "table", "table": [[[0]] * 8]}}
        with pikv_ds.attach(model, config, group), expect(CapacityError, "capacity_tokens", "30", "spill"):
            generate(model, ids, new_tokens=4)
    with report.check("overflow spill: the same load fits"):
        config = {"storage": {"capacity_tokens": 30, "placement": "table", "table": [[[0]] * 8]}, "page_size": 4}
        reference = generate(model, ids, new_tokens=4)
        with pikv_ds.attach(model, config, group) as cache:
            assert_same(generate(model, ids, new_tokens=4), reference, 1e-5)
            assert cache.stats()["spilled_group"] == 2 * (43 - 30), cache.stats()
            assert cache.stats()["load_per_rank"][0] == 2 * 30
    with report.check("no shard has room"):
        with pikv_ds.attach(model, {"storage": {"capacity_tokens": 39 // size}}, group), expect(CapacityError, "raise capacity_tokens"):
            generate(model, ids, new_tokens=4)


def check_calls(report: Report, model, group) -> None:
    with report.check("synced_gpus=False is refused"):
        with pikv_ds.attach(model, {}, group), expect(UnsupportedError, "synced_gpus"):
            model.generate(prompt(5, seed=1), max_new_tokens=2, synced_gpus=False)


def leave(report: Report, model, group, how: str) -> None:
    """Rank 1 leaves in the middle of a generation; rank 0 must say so within the timeout."""
    rank, timeout = dist.get_rank(), 6.0
    ids = prompt(12, seed=3)
    with pikv_ds.attach(model, {"timeout_s": timeout}, group) as cache, torch.no_grad():
        token = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        if rank == 1:
            if how == "dies":
                os._exit(3)
            deadline = time.monotonic() + 3 * timeout
            while time.monotonic() < deadline and not report.has_rank(0):
                time.sleep(0.1)
            os._exit(3)
        with report.check(f"the other rank {how}"):
            started = time.monotonic()
            with expect(PeerError, "timeout_s", "rank 0 of 2", "died"):
                for _ in range(5):
                    token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            waited = time.monotonic() - started
            assert waited < 2 * timeout, f"{waited:.1f} s"
    os._exit(0)  # the group is broken: nothing to tear down


def check_probe(report: Report, group) -> None:
    model, rank = tiny_model("qwen3_moe"), dist.get_rank()
    block = {"probe": "always"}
    with report.check("what a probe refuses on one rank is refused on all, and the group goes on"):
        ids = prompt(12, seed=3)
        expected = generate(model, ids, new_tokens=4)
        attention = find_attentions(model)[1]
        if rank == 1:
            attention.__class__ = LengthAttention
        words = ("layer 1 (LengthAttention)",) if rank == 1 else ("the probe of rank 1 of 2 refused", "no rank is attached")
        with expect(UnsupportedError, *words):
            pikv_ds.attach(model, block, group)
        assert not any(module._forward_hooks for module in model.modules())
        attention.__class__ = type(find_attentions(model)[0])
        with pikv_ds.attach(model, block, group) as cache:
            assert cache.stats()["probe_s"] > 0 and cache.stats()["exchange_collectives"] == 0
            assert_same(generate(model, ids, new_tokens=4), expected, 1e-5)


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    group = dist.new_group()
    model = tiny_model("qwen3_moe")
    if sys.argv[1] != "all":
        leave(report, model, group, sys.argv[1])
    check_divergence(report, model, group)
    check_capacity(report, model, group)
    check_calls(report, model, group)
    check_probe(report, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
