"""How often the host waits for the device in a decode step: never by itself on one rank."""

import pytest
import torch

from pikv_ds.staging import Arriving, sent
from tests.device.far import FAR, Far, FarTensor
from tests.device.steps import Counted, decoded
from tests.long_form import short_or_long

ROUTED = {"routing": {"method": "bounds", "budget_pages": 4, "sink_tokens": 4, "recent_tokens": 4}}
CASES = {  # family, block, how, waits per step at most
    "a loop": ("qwen3_moe", {}, "loop", 0),
    "generate": ("qwen3_moe", {}, "generate", 0),
    "generate, padded": ("qwen3_moe", {}, "generate padded", 0),
    "a window": ("mixtral", {}, "loop", 0.5),
    "a mask of the user's own": ("qwen3_moe", {}, "loop padded", 0),
    "a latent": ("deepseek_v3", {}, "generate", 1),
    "shards": ("qwen3_moe", {"storage": {"num_shards": 4}}, "loop", 1),
    "shards, a window, sinks": ("gpt_oss", {"storage": {"num_shards": 2}}, "generate padded", 1.5),
    "late experts": ("qwen3_moe", {"storage": {"num_shards": 4, "expert_ids": "true"}}, "loop", 1),
    "spilling refused": ("qwen3_moe", {"storage": {"num_shards": 2, "overflow": "error", "capacity_tokens": 200}}, "loop", 1),
    "a router": ("qwen3_moe", ROUTED, "loop", 0),
    "a router of shards": ("qwen3_moe", {"routing": {"method": "topk"}, "storage": {"num_shards": 4}}, "loop", 1),
    "a policy that watches": ("qwen3_moe", {"scheduling": {"method": "h2o", "budget_tokens": 256}}, "loop", 0),
    "integers": ("qwen3_dense", {"page_size": 64, "compression": {"method": "int8"}}, "generate", 0),
}
SHORT = ["generate, padded", "a window", "shards", "a policy that watches"]


@pytest.mark.parametrize("name", short_or_long(SHORT, list(CASES)))
def test_one_rank_never_stops(name, monkeypatch):
    family, block, how, waits = CASES[name]
    block = {"page_size": 4, **block}
    with Far().entered(monkeypatch) as far:
        found = decoded(family, block, how=how, far=far)
    # Whether a token is padding decides what is planned: a mask that generate() has not made is read, once.
    assert found.ours == (name == "a mask of the user's own"), found.stops
    assert found.waits <= waits, found.waits
    assert found.theirs <= ("generate" in how), "transformers asks once whether all rows have ended"
    check_outputs(found, decoded(family, block, how=how, far=None))


def check_outputs(found: Counted, here: Counted) -> None:
    """The device decodes what the CPU decodes."""
    assert len(found.outputs) == len(here.outputs) > 8
    for there, own in zip(found.outputs, here.outputs, strict=True):
        torch.testing.assert_close(there, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "stops"),
    [
        (lambda x: x.sum().item(), 1), (lambda x: bool(x.any()), 1), (lambda x: x.tolist(), 1), (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu", non_blocking=True), 0), (lambda x: x[x > 1], 1), (lambda x: x.nonzero(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x[[0, 2]], 1), (lambda x: x.repeat_interleave(x), 1), (lambda x: x.repeat_interleave(2), 0),
        (lambda x: torch.tensor([1, 2]).to(FAR), 1), (lambda x: torch.tensor([1, 2], device=FAR), 1), (lambda x: x.to(FAR), 0),
        (lambda x: torch.tensor([1, 2]).to(FAR, non_blocking=True), 1), (lambda x: torch.tensor([1]).pin_memory().to(FAR), 1),
        (lambda x: torch.tensor([1]).pin_memory().to(FAR, non_blocking=True), 0), (lambda x: x.copy_(torch.ones(3)), 1),
        (lambda x: sent([1, 2], torch.int64, FAR), 0), (lambda x: sent(torch.ones(2), torch.float32, FAR), 0),
        (lambda x: x.masked_fill_(x > 1, 0), 0), (lambda x: torch.where(x > 1, x, 0).cumsum(0).topk(2), 0),
        (lambda x: Arriving(x), 0), (lambda x: Arriving(x).values, 1),
    ],
)  # fmt: skip
def test_what_is_counted(what, stops, monkeypatch):
    with Far().entered(monkeypatch) as far:
        what(FarTensor(torch.tensor([1, 2, 3])))
    assert far.total() == stops, far.stops


def test_what_was_asked_for_earlier_is_waited_for(monkeypatch):
    x, y = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), torch.tensor([True, False])
    with Far().entered(monkeypatch) as far:
        asked = Arriving(FarTensor(x), FarTensor(y))
        far.next_step()
        first, second = asked.values
        assert asked.values[0] is first
    assert torch.equal(first, x.long()) and torch.equal(second, y.long())
    assert far.total() == 0 and sum(far.waits.values()) == 1 and sum(far.queued.values()) == 1
    assert Arriving(x).values[0] is x and Arriving(x).on_host


def test_tensors_of_both_do_not_mix(monkeypatch):
    with Far().entered(monkeypatch), pytest.raises(RuntimeError, match="tensors of the host"):
        FarTensor(torch.ones(2)) + torch.ones(2)
