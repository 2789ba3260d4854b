"""Backward on 2 ranks, with the same requests and with others: right for one forward, refused on every rank after a cached prefix."""

import pytest
import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.errors import UnsupportedError
from tests.adapters.test_gradients import assert_close, gradients, loss_of
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model


def main() -> None:
    report, model = Report(), tiny_model("qwen3_moe")
    dist.init_process_group("gloo")
    for requests in ("replicated", "distinct"):
        seed = 0 if requests == "replicated" else dist.get_rank()
        prefix, suffix = prompt(12, seed=2 + seed), prompt(5, seed=9 + seed)
        plain, loss = gradients(model, None, suffix), loss_of(model, prefix, suffix)
        with pikv_ds.attach(model, {"page_size": 4}, dist.group.WORLD, requests=requests):
            with report.check(f"one forward, {requests}"):
                assert_close(gradients(model, None, suffix), plain)
            with report.check(f"after a cached prefix, {requests}"):
                found = loss_of(model, prefix, suffix)
                torch.testing.assert_close(found, loss)
                with pytest.raises(UnsupportedError, match="lie on 2 ranks"):
                    found.backward()
            with torch.no_grad(), report.check(f"the ranks go on, {requests}"):
                torch.testing.assert_close(loss_of(model, prefix, suffix), loss)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
