"""Ranks that do not do the same: every one of them says so, whatever the others do. args: members, none = all that are for two ranks.

A member is a function of a Scene. What it does on some rank must raise one of the named errors there; each has a process group of its
own, as most leave it unusable.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.cache import PiKVCache
from pikv_ds.config import PiKVConfig
from pikv_ds.errors import ConfigError, DivergedError, PeerError
from pikv_ds.exchange.deadline import Deadline
from tests.dist.jobs.failures import expect
from tests.dist.jobs.report import Report
from tests.recorded import cases, host_core
from tests.tiny_models import prompt, tiny_model

PATIENT_S, SHORT_S = 60.0, 0.3
OWN, SAME = {"requests": "distinct"}, {"requests": "replicated"}
MEMBERS: dict[str, Callable[["Scene"], None]] = {}


def member(function: Callable[["Scene"], None]) -> Callable[["Scene"], None]:
    MEMBERS[function.__name__] = function
    return function


class Raised(Exception):
    """By a layer, in the middle of a forward."""


class Broken(host_core.Run):
    """A run whose forward can leave before a layer, or leave layers out."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.leave_before: int | None = None
        self.leave_with: type[BaseException] = Raised
        self.leave_out: tuple[int, ...] = ()

    def _layer(self, layer, positions) -> None:
        if layer.layer_idx == self.leave_before:
            self.leave_before = None
            raise self.leave_with
        if layer.layer_idx not in self.leave_out:
            super()._layer(layer, positions)


class Scene:
    """One process group, and caches on it that have begun in step."""

    def __init__(self) -> None:
        self.group, self.rank = dist.new_group(), dist.get_rank()
        self.caches: list[PiKVCache] = []
        dist.barrier()  # a rank that is still connecting would take a peer that has given up for a dead one

    def run(self, layers: list[str] = cases.BOTH, *, storage: dict = OWN, num_experts: int = host_core.EXPERTS, **block) -> Broken:
        made = PiKVConfig(**{"page_size": 4, "timeout_s": PATIENT_S, "storage": {"num_shards": 4} | storage} | block)
        specs = [host_core.spec(i, kind) for i, kind in enumerate(layers)]
        cache = PiKVCache(specs, made, num_experts=num_experts, dtype=torch.float32, device=torch.device("cpu"), group=self.group)
        self.caches.append(cache)
        return Broken(cache, made, self.group)

    def decoding(self, rows: int = 1, **options) -> Broken:
        """A run in steady decoding; rows: of each rank."""
        run = self.run(**options)
        run.prefill([9, 6, 7, 5][: 2 * rows])
        run.decode(2)
        return run

    def hurry(self) -> None:
        """What comes is out of step, so a short wait will do."""
        for cache in self.caches:
            cache.exchange.timeout_s, cache.exchange._deadline = SHORT_S, Deadline(self.group, SHORT_S)

    def out_of_step(self, *programs: Callable[[], object], says: tuple[str, ...] = ()) -> None:
        """Every rank runs its program, and gets a PeerError."""
        self.hurry()
        with expect(PeerError, *says):
            programs[self.rank]()

    def unusable(self, run: Broken) -> None:
        with expect(PeerError, "cannot be used any more", "new_group"):
            run.decode(1)


# ---- made differently --------------------------------------------------------------------------------------------------------

DIFFERENT = {
    "page_size": ({"page_size": 4}, {"page_size": 8}),
    "codec": ({"compression": {"method": "none"}}, {"compression": {"method": "fp8_e4m3"}}),
    "raw_recent_tokens": ({"compression": cases.RAW_FP8}, {"compression": cases.RAW_FP8 | {"raw_recent_tokens": 9}}),
    "budget_ratio": tuple({"scheduling": {"method": "h2o", "budget_ratio": ratio}} for ratio in (0.5, 0.6)),
    "router": ({}, {"routing": {"method": "bounds", "budget_pages": 5, "sink_tokens": 2, "recent_tokens": 4}}),
    "layers": ({"layers": ["full", "window"]}, {"layers": ["full", "full"]}),
    "depth": ({"layers": ["full", "window"]}, {"layers": ["full"]}),
    "experts": ({"num_experts": 8}, {"num_experts": 16}),
    "expert_ids": ({"storage": OWN | {"expert_ids": "hash"}}, {"storage": OWN | {"expert_ids": "true"}}),
}
NAMED = {
    "page_size": ("pikv.page_size = 4 on rank 0, 8 on rank 1",),
    "codec": ("pikv.compression.method", "fp8_e4m3"),
    "raw_recent_tokens": ("pikv.compression.raw_recent_tokens", "9 on rank 1"),
    "budget_ratio": ("pikv.scheduling.budget_ratio = 0.5 on rank 0, 0.6 on rank 1",),
    "router": ("pikv.routing.method", "'bounds' on rank 1"),
    "layers": ("layer 1", "window=None"),
    "depth": ("layer 1", "not there on rank 1"),
    "experts": ("experts = 8 on rank 0, 16 on rank 1",),
    "expert_ids": ("pikv.storage.expert_ids",),
}


def made_differently(scene: Scene, what: str) -> None:
    """All say which key, and the group is as good as before: caches that are alike open on it."""
    run = scene.run(**DIFFERENT[what][scene.rank])
    with expect(ConfigError, *NAMED[what]):
        run.prefill([9, 6])
    assert not run.cache.ranks.lockstep(False)


for _what in DIFFERENT:
    MEMBERS[f"different {_what}"] = partial(made_differently, what=_what)


@member
def more_query_heads(scene: Scene) -> None:
    """Which no specification says."""
    run = scene.run()
    draw = run._draw
    run._draw = lambda *args: (draw(*args)[0].repeat_interleave(1 + scene.rank, 2), *draw(*args)[1:])
    scene.out_of_step(*[lambda: run.prefill([9, 6])] * 2, says=("shapes of queries",))


@member
def other_batches_of_the_same_requests(scene: Scene) -> None:
    run = scene.run(storage=SAME)
    with expect(DivergedError, "1 rows", "2 rows"):
        run.prefill([9] * (1 + scene.rank))
    run.prefill([9, 9])  # alike again
    run.decode(2)


# ---- one forwards, the other does something else -----------------------------------------------------------------------------


@member
def first_forward_beside_lockstep(scene: Scene) -> None:
    run = scene.run()
    says = ("rank 0: the first forward of a new cache", "rank 1: lockstep, not active")
    scene.out_of_step(lambda: run.prefill([9, 6]), lambda: run.cache.ranks.lockstep(False), says=says)
    run.cache.reset()
    run.prefill([9, 6])  # all heard the same, so the group can go on


@member
def decoding_beside_lockstep(scene: Scene) -> None:
    run = scene.decoding()
    says = ("rank 0: gave up waiting for the others in forward 4 of cache 1", "lockstep")
    scene.out_of_step(lambda: run.decode(1), lambda: run.cache.ranks.lockstep(True), says=says)
    scene.unusable(run)


@member
def more_forwards_on_one_rank(scene: Scene) -> None:
    """Rank 1 stops and comes back long after rank 0 has given up."""
    run = scene.decoding()
    scene.hurry()
    if scene.rank:
        time.sleep(3 * SHORT_S)
    with expect(PeerError, "gave up", "lockstep" if scene.rank else "sharing layer 0"):
        run.decode(1) if scene.rank == 0 else run.cache.ranks.lockstep(False)
    scene.unusable(run)


@member
def another_cache(scene: Scene) -> None:
    """Each in a steady cache of its own, the records of which are not of one length."""
    one, two = scene.decoding(rows=1), scene.decoding(rows=2)
    says = ("forward 4 of cache 1", "forward 4 of cache 2")
    scene.out_of_step(lambda: one.decode(1), lambda: two.decode(1), says=says)
    scene.unusable(two)


@member
def another_cache_after_a_third(scene: Scene) -> None:
    one, two = scene.decoding(rows=1), scene.decoding(rows=2)
    scene.decoding()
    says = ("rank 0: forward 4 of cache 1", "rank 1: forward 4 of cache 2")
    scene.out_of_step(lambda: one.decode(1), lambda: two.decode(1), says=says)
    for run in (one, two):
        run.cache.reset()
        run.prefill([9, 6])


@member
def a_new_cache_beside_decoding(scene: Scene) -> None:
    run = scene.decoding()
    scene.out_of_step(lambda: run.decode(1), lambda: scene.run(timeout_s=SHORT_S).prefill([9, 6]), says=("rank 1", "a new cache"))


@member
def reset_on_one_rank(scene: Scene) -> None:
    run = scene.decoding()

    def again() -> None:
        run.cache.reset()
        run.prefill([9, 6])

    scene.out_of_step(lambda: run.decode(1), again, says=("after its reset",))


@member
def a_gather_of_another_name(scene: Scene) -> None:
    ranks = scene.decoding().cache.ranks
    says = ("rank 0: counting", "rank 1: lockstep")
    scene.out_of_step(lambda: ranks.gather_ints([3], ranks.device, "counting"), lambda: ranks.lockstep(True), says=says)


# ---- one leaves a forward ----------------------------------------------------------------------------------------------------


def leaves(scene: Scene, run: Broken, before: int, kind: type[BaseException] = Raised) -> None:
    run.leave_before, run.leave_with = before, kind
    with expect(kind):
        run.decode(1)


@member
def raises_midway_and_begins_anew(scene: Scene) -> None:
    run = scene.decoding()

    def leave() -> None:
        leaves(scene, run, 1)
        run.prefill([30, 30])

    scene.out_of_step(lambda: run.decode(1), leave, says=("after one that broke off",))
    scene.unusable(run)


@member
def interrupted_midway_and_in_lockstep(scene: Scene) -> None:
    run = scene.decoding()

    def leave() -> None:
        leaves(scene, run, 1, KeyboardInterrupt)
        run.cache.ranks.lockstep(True)

    scene.out_of_step(lambda: run.decode(1), leave)


@member
def raises_after_the_last_layer(scene: Scene) -> None:
    """All its collectives are made; its cache has not ended the forward."""
    run = scene.decoding()

    def leave() -> None:
        run.cache.end_step = lambda: (_ for _ in ()).throw(Raised())
        with expect(Raised):
            run.decode(1)
        del run.cache.end_step
        run.prefill([9, 6])

    scene.out_of_step(lambda: run.decode(2), leave, says=("after one that broke off",))


@member
def leaves_out_the_last_layer(scene: Scene) -> None:
    run = scene.decoding(layers=["full", "window", "latent"])

    def short() -> None:
        run.leave_out = (2,)
        run.decode(2)

    scene.out_of_step(lambda: run.decode(1), short)


@member
def leaves_out_the_last_layer_of_a_watched_cache(scene: Scene) -> None:
    """What is sent at the end of a forward must not meet the record of the last layer."""
    run = scene.decoding(scheduling=DIFFERENT["budget_ratio"][0]["scheduling"])

    def short() -> None:
        run.leave_out = (1,)
        run.chunk([8, 9])

    scene.out_of_step(short, lambda: run.chunk([8, 9]), says=("forward 4 of cache 1",))


@member
def leaves_out_a_layer(scene: Scene) -> None:
    run = scene.decoding(layers=["full", "latent", "window"])

    def short() -> None:
        run.leave_out = (1,)
        run.decode(1)

    scene.out_of_step(lambda: run.decode(1), short)


@member
def a_model_raises_in_one_layer(scene: Scene) -> None:
    """Through attach: a hook of the user's raises on rank 1, which goes on with another prompt."""
    model = tiny_model("qwen3_moe")
    block = {"timeout_s": SHORT_S if scene.rank else 2 * SHORT_S, "storage": OWN}
    with pikv_ds.attach(model, block, scene.group) as cache, torch.no_grad():
        handle = None
        if scene.rank:
            handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Raised()))
            with expect(Raised):
                model(prompt(8, seed=1))
            handle.remove()
        with expect(PeerError):
            model(prompt(12, seed=2))
        with expect(PeerError, "cannot be used any more"):
            cache.core.ranks.lockstep(True)


# ---- all alike ---------------------------------------------------------------------------------------------------------------


@member
def all_break_off_and_reset(scene: Scene) -> None:
    run = scene.decoding()
    for again in (run.cache.reset, lambda: None):  # a new generation needs no reset
        leaves(scene, run, 1)
        again()
        run.prefill([9, 6])
        run.decode(2)


@member
def interleaved_caches_switch_by_one_frame(scene: Scene) -> None:
    one, two = scene.decoding(rows=1), scene.decoding(rows=2)
    layers = len(cases.BOTH)
    for run in (one, two, two, one):
        before, others = run.cache.exchange.collectives, run.cache.exchange.state.holder != run.cache.exchange.turn.cache
        run.decode(1)
        assert run.cache.exchange.collectives - before == 2 * layers + others
        assert run.cache.ranks.lockstep(scene.rank == 0)
    assert not one.cache.ranks.lockstep(False)


@member
def short_forwards_on_all_ranks(scene: Scene) -> None:
    run = scene.decoding()
    for leave_out in ((), (1,), (), (), (0,), ()):
        run.leave_out = leave_out
        run.decode(1)


@member
def another_group_after_a_broken_one(scene: Scene) -> None:
    run = scene.decoding()
    scene.out_of_step(lambda: run.decode(1), lambda: run.cache.ranks.lockstep(True))
    scene.unusable(run)
    run.cache.reset()  # needs nobody
    scene.group = dist.new_group()
    scene.decoding()


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    for name in sys.argv[1:] or MEMBERS:
        with report.check(name):
            MEMBERS[name](Scene())
    # Left to the interpreter: an unanswered collective must not keep a process that has said all it had to say.


if __name__ == "__main__":
    main()
