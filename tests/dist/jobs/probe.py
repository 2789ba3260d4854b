"""What a probe refuses on one rank is refused on all of them, and the group goes on. args: none."""

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.hf.anatomy import find_attentions
from pikv_ds.errors import UnsupportedError
from tests.adapters.test_probe import LengthAttention
from tests.dist.jobs.exact import assert_same, generate
from tests.dist.jobs.failures import expect
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model


def main() -> None:
    dist.init_process_group("gloo")
    report, rank, group = Report(), dist.get_rank(), dist.new_group()
    ids = prompt(12, seed=3)
    plain = tiny_model("qwen3_moe")
    with report.check("refused on all"):
        model = tiny_model("qwen3_moe")
        if rank == 1:
            find_attentions(model)[1].__class__ = LengthAttention
        words = ("layer 1 (LengthAttention)",) if rank == 1 else ("the probe of rank 1 of 2 refused", "no rank is attached")
        with expect(UnsupportedError, *words):
            pikv_ds.attach(model, {"probe": "always"}, group)
        assert not any(module._forward_hooks for module in model.modules())
    with report.check("served"):
        expected = generate(plain, ids, new_tokens=4)
        with pikv_ds.attach(plain, {"probe": "always"}, group) as cache, torch.no_grad():
            assert cache.stats()["probe_s"] > 0 and cache.stats()["exchange_collectives"] == 0
            assert_same(generate(plain, ids, new_tokens=4), expected, 1e-5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
