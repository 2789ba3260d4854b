"""Random programs of forwards, locksteps and resets over several caches of one group, one rank of which departs from it at one place.

args: first seed, how many programs. Every rank must end with an error that has a name, or all must end, each with the outputs that it
gets alone. All ranks draw the same program and the same departure from the seed.
"""

import random
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist

from pikv_ds.cache import PiKVCache
from pikv_ds.config import PiKVConfig
from pikv_ds.errors import CapacityError, ConfigError, DivergedError, PeerError, UnsupportedError
from tests.dist.jobs.mismatch import Broken, Raised, Scene
from tests.dist.jobs.report import Report
from tests.recorded import cases, host_core

NAMED = (PeerError, DivergedError, ConfigError, UnsupportedError, CapacityError)
IN_STEP_S, OUT_OF_STEP_S, LONGEST_S = 60.0, 0.4, 40.0
BLOCKS = {
    "plain": {},
    "bounds": {"routing": {"method": "bounds", "budget_pages": 5, "sink_tokens": 2, "recent_tokens": 4}},
    "h2o": {"scheduling": {"method": "h2o", "budget_tokens": 48, "sink_tokens": 2, "recent_tokens": 6}},
    "raw": {"compression": cases.RAW_FP8},
    "late": {"storage": {"expert_ids": "true"}},
}
LAYERS = (["full", "window"], ["full", "latent", "window"], ["full"])
DEPARTURES = (
    "none", "left out", "twice", "lockstep before", "another cache", "reset before", "raises and goes on", "raises and begins anew",
    "interrupted, lockstep", "a layer left out", "other lengths", "made differently", "late", "more rows", "ends",
    "the first layer left out", "more heads",
)  # fmt: skip
Op = tuple  # name, number of a cache, argument


def program(draw: random.Random, size: int) -> tuple[list[dict], list[Op]]:
    """What the caches are, and what happens to them. Lengths are of all rows of all ranks."""
    made, ops = [], []
    for number in range(draw.randint(1, 3)):
        requests = draw.choice(("distinct", "replicated"))
        rows = draw.randint(1, 2) * (size if requests == "distinct" else 1)
        made.append({"requests": requests, "block": draw.choice(list(BLOCKS)), "layers": draw.choice(LAYERS), "rows": rows})
        ops.append(("prefill", number, [draw.randint(1, 24) for _ in range(rows)]))
    for _ in range(draw.randint(4, 10)):
        number = draw.randrange(len(made))
        rows = made[number]["rows"]
        name = draw.choice(("decode", "decode", "decode", "chunk", "lockstep", "reset", "prefill"))
        argument = {"decode": draw.randint(1, 3), "lockstep": draw.random() < 0.5, "reset": None}.get(name)
        if name in ("chunk", "prefill"):
            argument = [draw.randint(1, 9) for _ in range(rows)]
        ops.append((name, number, argument))
        if name == "reset":
            ops.append(("prefill", number, [draw.randint(1, 9) for _ in range(rows)]))
    return made, ops


class Player:
    """One rank's run of a program."""

    def __init__(self, made: list[dict], open_one: Callable[[int], Broken]) -> None:
        self.made, self.open_one = made, open_one
        self.runs: dict[int, Broken] = {}

    def run(self, number: int) -> Broken:
        if number not in self.runs:
            self.runs[number] = self.open_one(number)
        return self.runs[number]

    def do(self, op: Op) -> None:
        name, number, argument = op
        run = self.run(number)
        if name in ("decode", "chunk") and not hasattr(run, "rows"):  # a departure has left out what began it
            name, argument = "prefill", [7] * self.made[number]["rows"]
        if name == "chunk":
            argument = argument * 2  # a departure may have doubled the rows
        if name == "lockstep":
            run.cache.ranks.lockstep(argument)
        elif name == "reset":
            run.cache.reset()
        else:
            getattr(run, name)(argument)

    def leave(self, op: Op, kind: type[BaseException]) -> None:
        """The operation, left before its last layer."""
        run = self.run(op[1])
        run.leave_before, run.leave_with = len(self.made[op[1]]["layers"]) - 1, kind
        try:
            self.do(op)
        except kind:
            pass
        run.leave_before = None


def depart(player: Player, how: str, ops: list[Op], at: int) -> list[Op]:
    """Operation `at` in another way; returns what this rank does after it."""
    op, rest = ops[at], ops[at + 1 :]
    name, number, argument = op
    begun = sorted({o[1] for o in ops[:at]} | {number})
    if how == "left out":
        return rest
    if how == "ends":
        return []
    if how == "late":
        time.sleep(3 * OUT_OF_STEP_S)
    if how == "lockstep before":
        player.do(("lockstep", number, True))
    if how == "reset before":
        player.do(("reset", number, None))
    if how.startswith("raises") or how.startswith("interrupted"):
        player.leave(op, KeyboardInterrupt if how.startswith("interrupted") else Raised)
        if how == "raises and begins anew":
            player.do(("prefill", number, [7] * player.made[number]["rows"]))
        if how == "interrupted, lockstep":
            player.do(("lockstep", number, False))
        return rest
    if how in ("a layer left out", "the first layer left out"):
        player.run(number).leave_out = (0 if "first" in how else len(player.made[number]["layers"]) - 1,)
        player.do(op)
        player.run(number).leave_out = ()
        return rest
    if how == "another cache":
        op = (name, begun[0], argument) if begun[0] != number and name in ("decode", "lockstep", "reset") else ("decode", begun[0], 1)
    if how == "other lengths" and isinstance(argument, list):
        op = (name, number, [length + 1 for length in argument])
    if how == "more heads":
        more_heads(player.run(number))
    if how == "more rows" and name == "prefill":
        op = (name, number, argument * 2)
    player.do(op)
    if how == "twice":
        player.do(op)
    return rest


def more_heads(run: Broken) -> None:
    draw = run._draw

    def drawn(*args) -> tuple:
        q, *rest = draw(*args)
        return q.repeat_interleave(2, 2), *rest

    run._draw = drawn


def block_of(cache: dict, timeout_s: float, **more) -> PiKVConfig:
    block = BLOCKS[cache["block"]] | {"page_size": 4, "timeout_s": timeout_s} | more
    storage = {"num_shards": 6, "requests": cache["requests"]} | block.get("storage", {})
    return PiKVConfig(**block | {"storage": storage})


def play(seed: int) -> tuple[str, str, float, bool]:
    """(departure, outcome, seconds, compared with this rank alone)."""
    draw, rank, size = random.Random(seed), dist.get_rank(), dist.get_world_size()
    made, ops = program(draw, size)
    how, who, at = draw.choice(DEPARTURES), draw.randrange(size), draw.randrange(len(ops))
    scene = Scene()
    timeout_s = IN_STEP_S if how == "none" else OUT_OF_STEP_S

    def open_one(number: int, group: dist.ProcessGroup | None = scene.group) -> Broken:
        cache = made[number]
        more = {"page_size": 8} if how == "made differently" and who == rank and number == ops[at][1] else {}
        config = block_of(cache, timeout_s, **more)
        specs = [host_core.spec(i, kind) for i, kind in enumerate(cache["layers"])]
        core = PiKVCache(specs, config, num_experts=host_core.EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=group)
        run = Broken(core, config, group)
        run.distinct, run.rank, run.size = cache["requests"] == "distinct", rank, size
        return run

    player, started = Player(made, open_one), time.monotonic()
    try:
        pending = list(ops)
        while pending:
            if rank == who and how != "none" and len(ops) - len(pending) == at:
                pending = depart(player, how, ops, at)
                at = -1
            else:
                player.do(pending.pop(0))
        player.run(0).cache.ranks.meet("the end of the program")
        outcome = "ended"
    except NAMED as error:
        outcome = type(error).__name__
    seconds = time.monotonic() - started
    compared = outcome == "ended" and (how == "none" or rank != who)
    if compared:
        alone = Player(made, lambda number: open_one(number, None))
        for op in ops:
            alone.do(op)
        for number, run in player.runs.items():
            if made[number]["block"] in ("plain", "late"):  # the others follow what other rows fill shards with
                for one, other in zip(run.outputs, alone.runs[number].outputs, strict=True):
                    off = float((one.nan_to_num() - other.nan_to_num()).abs().max()) if one.shape == other.shape else float("inf")
                    assert off <= 1e-4, f"seed {seed}, {how!r}, cache {number} of {made}: off by {off:.1e} from this rank alone"
    dist.destroy_process_group(scene.group)
    if len(sys.argv) > 3:
        print(seed, how, outcome, f"{seconds:.2f}", flush=True)
    return how, outcome, seconds, compared


def main() -> None:
    report, first, count = Report(), int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    with report.check("programs") as row:
        tally: Counter[str] = Counter()
        compared, longest = 0, 0.0
        for seed in range(first, first + count):
            how, outcome, seconds, equal = play(seed)
            outcomes: list = [None] * dist.get_world_size()
            dist.all_gather_object(outcomes, outcome)
            ended = [each == "ended" for each in outcomes]
            assert all(ended) or not any(ended), f"seed {seed}, {how!r}: {outcomes}"
            assert how != "none" or all(ended), f"seed {seed}, nobody departs: {outcomes}"
            assert seconds < LONGEST_S, f"seed {seed}, {how!r}: {seconds:.1f} s"
            tally[f"{how}: {'all ended' if all(ended) else ', '.join(sorted(set(outcomes)))}"] += 1
            compared, longest = compared + equal, max(longest, seconds)
        row |= {"tally": dict(sorted(tally.items())), "compared_alone": compared, "longest_s": round(longest, 2)}
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
