"""Decode steps that are recorded once and played again give what steps that run as they are give, bit for bit, and store the same."""

import pytest
import torch

from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec
from tests.device.captured import Steps
from tests.device.far import FAR, Far
from tests.device.tape import Tape, held
from tests.long_form import short_or_long

PROMPT, RESERVED, PLAYED = 9, 40, 20


def layers(windows: list[int | None], dim: int = 8, latent: bool = False) -> list[LayerSpec]:
    k_dim = dim + 8 if latent else dim
    return [
        LayerSpec(layer_idx=i, num_kv_heads=1 if latent else 2, k_dim=k_dim, v_dim=dim, window=window, latent=latent)
        for i, window in enumerate(windows)
    ]


INT8 = {"page_size": 64, "compression": {"method": "int8"}}
BUDGET = {"method": "streaming_llm", "budget_tokens": 16, "sink_tokens": 4, "recent_tokens": 4, "interval": 3}
SHARDS = {"page_size": 4, "storage": {"num_shards": 4}}
CASES = {
    "one shard": (layers([None, None]), {"page_size": 4}),
    "shards": (layers([None, None]), SHARDS),
    "full shards": (layers([None]), {"page_size": 4, "storage": {"num_shards": 4, "capacity_tokens": 36}}),
    "windows": (layers([None, 6, 13]), {"page_size": 4}),
    "windows and shards": (layers([6, None]), SHARDS),
    "int8": (layers([None], dim=16), INT8),
    "latent": (layers([None], latent=True), {"page_size": 4}),
    "late experts": (layers([None, None]), {"page_size": 4, "storage": {"num_shards": 4, "expert_ids": "true"}}),
    "a budget": (layers([None, None]), {"page_size": 4, "scheduling": BUDGET}),
}
SHORT = ["one shard", "windows and shards", "full shards", "int8", "late experts"]


def prepared(name: str, device: torch.device, rows: int = 3) -> tuple[Steps, Steps]:
    specs, block = CASES[name]
    played, plain = (Steps(specs, block, rows, device=device) for _ in range(2))
    for steps in (played, plain):
        steps.forward(1, PROMPT)
    played.cache.reserve(RESERVED)
    return played, plain


def check(played: Steps, plain: Steps, name: str) -> None:
    graph, before = played.record(Tape()), None
    for step in range(PLAYED):
        num_new = [1, 0, 1] if step % 7 == 5 else None  # a row that has nothing to say
        found, expected = played.play(graph, 10 + step, num_new), plain.forward(10 + step, 1, num_new)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(held(x), held(y)), (name, step)
        if step < 3 or step % 5 == 4:
            assert played.counted() == plain.counted(), (name, step)
            for x, y in zip(played.stored(), plain.stored(), strict=True):
                assert torch.equal(x, y), (name, step)
        before = before or played.probe.addresses
        assert played.probe.addresses == before, (name, step)
    assert not graph.stale


@pytest.mark.parametrize("name", short_or_long(SHORT, list(CASES)))
def test_played_steps_are_steps(name):
    check(*prepared(name, torch.device("cpu")), name)


@pytest.mark.parametrize("name", short_or_long(["windows and shards"], list(CASES)))
def test_played_steps_on_a_device_do_not_stop_the_host(name, monkeypatch):
    with Far().entered(monkeypatch) as far:
        played, plain = prepared(name, FAR)
        graph = played.record(Tape())
        for step in range(3):
            found, expected = played.play(graph, 10 + step), plain.forward(10 + step)
            far.next_step()
            assert all(torch.equal(held(x), held(y)) for x, y in zip(found, expected, strict=True)), step
        far.clear()
        for step in range(3, PLAYED):
            played.play(graph, 10 + step)
            far.next_step()
        if name != "a budget":  # an eviction reads one tensor, when it is due
            assert far.total() == 0, far.stops


def test_reserved_steps_ask_for_the_same_each_time():
    """Also unrecorded: no op of a step gets another shape, no tensor of the cache another place."""
    played, _ = prepared("windows and shards", torch.device("cpu"))
    played.forward(2)
    asked, places = [], played.probe.addresses
    for seed in range(8):
        local, given = played.local(1), played.bring(seed, 1)
        played.cache.begin_step(local)
        tape = Tape()
        tape.record(lambda given=given: played.attend(given))
        played.cache.end_step()
        played._grew(local)
        asked.append(tape.asked)
        assert played.probe.addresses == places
    assert asked.count(asked[0]) == len(asked)


def test_a_graph_is_stale_once_memory_has_moved():
    played, _ = prepared("one shard", torch.device("cpu"))
    graph = played.record(Tape())
    for seed in range(3):
        played.play(graph, seed)
    played.lens = [RESERVED, PROMPT, PROMPT]
    with pytest.raises(UnsupportedError, match="reserve\\(\\) has made room for 40"):
        played.play(graph, 4)
    played.lens = [PROMPT + 3] * 3
    played.play(graph, 5)  # what was refused has changed nothing
    played.forward(6, columns=RESERVED)  # a longer row: what was reserved is let go
    assert graph.stale and played.probe.reserved_tokens is None
    with pytest.raises(UnsupportedError, match="generation"):
        played.play(graph, 7)
    played.cache.reserve(200)
    with pytest.raises(UnsupportedError, match="generation"):
        played.play(graph, 7)  # there is room again, but elsewhere
    again = played.record(Tape())
    for seed in range(3):
        played.play(again, seed)
    played.cache.reset()
    assert again.stale


def test_a_chunk_inside_the_reservation_moves_nothing():
    played, plain = prepared("shards", torch.device("cpu"))
    graph = played.record(Tape())
    for seed in range(3):
        played.play(graph, seed), plain.forward(seed)
    for steps in (played, plain):
        steps.forward(4, columns=5)
    assert not graph.stale
    for x, y in zip(played.play(graph, 5), plain.forward(5), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"routing": {"method": "bounds", "budget_pages": 4, "sink_tokens": 4, "recent_tokens": 4}}, "plans on the host how many pages"),
        ({"scheduling": {"method": "h2o", "budget_tokens": 256}}, "watches attention"),
    ],
)
def test_what_can_not_be_recorded_says_why(block, words):
    steps = Steps(layers([None]), {"page_size": 4, **block}, 2)
    with pytest.raises(UnsupportedError, match="run the prompt first"):
        steps.cache.reserve(40)
    steps.forward(1, PROMPT)
    with pytest.raises(UnsupportedError, match="call reserve"):
        steps.record(Tape())
    steps.cache.reserve(40)
    with pytest.raises(UnsupportedError, match=words):
        steps.record(Tape())


def test_reservations_that_can_not_be_made():
    steps = Steps(layers([None]), {"page_size": 64, "compression": {"method": "int8", "raw_recent_tokens": 64}}, 2)
    steps.forward(1, PROMPT)
    with pytest.raises(UnsupportedError, match="several pools"):
        steps.cache.reserve(400)
    steps = Steps(layers([None]), {"page_size": 4}, 2)
    steps.forward(1, PROMPT)
    with pytest.raises(UnsupportedError, match="has 9 tokens already"):
        steps.cache.reserve(5)
