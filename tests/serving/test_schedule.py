"""Which tokens run in a step, without a model: who goes first, in which pieces, on which rank; and what a prompt takes over."""

import time
from dataclasses import replace

import pytest

from pikv_ds.launch.serving.messages import Sampling
from pikv_ds.launch.serving.pace import Pace
from pikv_ds.launch.serving.prefix import PrefixIndex
from pikv_ds.launch.serving.request import Request
from pikv_ds.launch.serving.schedule import Scheduler
from pikv_ds.launch.serving.spec import ServeSpec

SPEC = ServeSpec(
    backend="hf", model="", load=None, name="m", block={}, dtype="float32", ranks=1, tp=1, ep=1, threads=1, max_length=4096,
    max_running=4, max_waiting=8, kv_tokens=None, prefix_rows=2, max_chunk=100, schedule="deadline", ttft_ms=1000, tbt_ms=50, timeout_s=9,
    chat_template=None,
)  # fmt: skip


class _Text:
    stopped = False

    def push(self, token: int) -> None: ...

    def finish(self) -> None: ...

    def take(self, *, last: bool) -> str:
        return ""


def request(length: int, *, arrived: float = 0.0, first: int = 0, answer: int = 8) -> Request:
    prompt = list(range(first, first + length))
    return Request(
        prompt=prompt, max_tokens=answer, sampling=Sampling(temperature=0), out=_Text(), tell=lambda update: None, arrived=arrived,
        eos=frozenset(),
    )  # fmt: skip


def run(scheduler: Scheduler, now: float = 0.0):
    """Plan a step and account for it, as the engine does; what has its prompt gets a token."""
    plan = scheduler.plan(now)
    by_number = {one.number: one for one in scheduler.running}
    for number, count in plan.pieces:
        by_number[number].stored += count
        if not by_number[number].waits_for_prompt:
            by_number[number].push(1, None)
    return plan


def test_a_prompt_runs_in_pieces_beside_requests_that_decode():
    scheduler = Scheduler(SPEC, None)
    scheduler.pace.decode_ms, scheduler.pace.token_ms = 20.0, 1.0
    first, long = request(10), request(90, first=100)
    scheduler.add(first)
    assert run(scheduler).pieces == [(first.number, 10)]  # nothing decodes yet: up to max_chunk
    scheduler.add(long)
    steps = [run(scheduler).pieces for _ in range(4)]
    # .9 x 50 ms - 20 ms leave 25 tokens of 1 ms in a step.
    assert steps == [[(first.number, 1), (long.number, 25)]] * 3 + [[(first.number, 1), (long.number, 15)]]
    assert run(scheduler).pieces == [(first.number, 1), (long.number, 1)]


def test_first_come_first_served_runs_prompts_whole():
    scheduler = Scheduler(replace(SPEC, schedule="fcfs"), None)
    scheduler.pace.decode_ms, scheduler.pace.token_ms = 20.0, 1.0
    asked = [request(10), request(90, first=100), request(30, first=300)]
    for one in asked:
        scheduler.add(one)
    assert run(scheduler).pieces == [(asked[0].number, 10), (asked[1].number, 90)]
    assert run(scheduler).pieces == [(asked[0].number, 1), (asked[1].number, 1), (asked[2].number, 30)]


def test_who_goes_first():
    scheduler = Scheduler(replace(SPEC, max_chunk=1000, max_running=1), PrefixIndex(2))
    scheduler.pace.token_ms = 1.0
    starved, late = request(10, arrived=0.0), request(10, arrived=3.9, first=20)
    relaxed, urgent = request(10, arrived=4.99, first=40), request(500, arrived=4.9, first=1000)
    cached = request(40, arrived=4.995, first=5000)
    scheduler.prefixes.hold(99, 0, list(range(5000, 5040)))
    for one in (relaxed, late, urgent, cached, starved):
        scheduler.add(one)
    order = []
    while scheduler.waiting:
        run(scheduler, 5.0)
        order.append(scheduler.running[0])
        scheduler.finish(scheduler.running[0])
    # Beyond 4 x its target; in time: a cached beginning, then least slack; then who can't be in time any more.
    assert order == [starved, cached, urgent, relaxed, late]
    assert cached.reused == 32 and scheduler.found == 32


def test_ranks_share_the_load_and_a_full_service_lets_requests_wait():
    scheduler = Scheduler(replace(SPEC, ranks=2, max_running=2, kv_tokens=60), None)
    asked = [request(20, first=100 * i) for i in range(6)]
    for one in asked:
        scheduler.add(one)
    plan = run(scheduler)
    assert [new.rank for new in plan.new] == [0, 1, 0, 1]
    assert [one.rank for one in asked] == [0, 1, 0, 1, None, None]
    scheduler.finish(asked[1])
    plan = run(scheduler)
    assert [(new.number, new.rank) for new in plan.new] == [(asked[4].number, 1)] and plan.drop == [asked[1].number]


def test_a_request_too_large_for_the_room_waits_but_runs_alone():
    scheduler = Scheduler(replace(SPEC, kv_tokens=50), None)
    small, large = request(20, answer=4), request(46, first=100, answer=4)
    scheduler.add(small)
    scheduler.add(large)
    run(scheduler)
    assert scheduler.running == [small]
    scheduler.finish(small)
    run(scheduler)
    assert scheduler.running == [large]


def test_prefixes_are_found_by_blocks_and_parked_ones_go_in_order():
    index = PrefixIndex(parked=2)
    texts = [list(range(100 * i, 100 * i + 40)) for i in range(4)]
    for number, text in enumerate(texts):
        index.hold(number, 0, text)
    assert index.match(texts[1]) == (1, 0, 32)
    assert index.match(texts[1][:33]) == (1, 0, 32)
    assert index.match(texts[1][:32]) == (1, 0, 16)  # the last token of a prompt is always run
    assert index.match([7, *texts[1]]) is None
    assert index.park(0, 0) == [] and index.park(1, 0) == []
    assert index.match(texts[0]) == (0, 0, 32)  # used: it goes after the other
    assert index.park(2, 0) == [1]
    assert index.match(texts[1]) is None and index.match(texts[0]) is not None


def parked(scheduler: Scheduler, first: int) -> Request:
    """A request of 40 tokens that has run and is done; 47 of its tokens stay."""
    one = request(40, first=first)
    scheduler.add(one)
    while len(one.tokens) < one.max_tokens:
        run(scheduler)
        if len(one.tokens) == 1:
            scheduler.prefixes.hold(one.number, one.rank, one.prompt)
    scheduler.prefixes.hold(one.number, one.rank, (one.prompt + one.tokens)[: one.stored])
    scheduler.finish(one)
    return one


def test_parked_entries_count_and_go_first_where_others_need_their_room():
    scheduler = Scheduler(replace(SPEC, kv_tokens=150), PrefixIndex(2))
    old, new = parked(scheduler, 0), parked(scheduler, 100)
    assert scheduler.prefixes.parked_tokens(0) == 94
    fits = request(40, first=300)
    scheduler.add(fits)  # 48 with its answer
    assert run(scheduler).drop == []
    more = request(20, first=400)
    scheduler.add(more)
    assert run(scheduler).drop == [old.number] and scheduler.running == [fits, more]
    # A prompt that takes entries over needs their place for itself: they go in the step that it begins in.
    again = request(60, first=100)
    scheduler.add(again)
    plan = run(scheduler)
    assert [(one.source, one.keep) for one in plan.new] == [(new.number, 32)] and plan.drop == [new.number]
    assert len(scheduler.prefixes) == 0 and scheduler.prefixes.parked_tokens(0) == 0


def test_pace_is_learned():
    pace = Pace()
    assert pace.chunk(50, 512) == 64  # nothing is known yet
    for _ in range(50):
        pace.note(20.0, 0)
        pace.note(20.0 + 2.0 * 30, 30)
    assert pace.decode_ms == pytest.approx(20) and pace.token_ms == pytest.approx(2)
    assert pace.chunk(50, 512) == 16 and pace.chunk(120, 512) == 44 and pace.chunk(1e6, 512) == 512
    assert pace.chunk(1, 8) == 8


def test_planning_many_waiting_prompts_is_quick():
    scheduler = Scheduler(replace(SPEC, max_waiting=1000), PrefixIndex(2))
    for i in range(500):
        scheduler.add(request(200, first=1000 * i))
    started = time.process_time()
    scheduler.plan(0.0)
    assert time.process_time() - started < 1.0
