"""One fault in one move: where it fell, and what became of the move. Used by the tests and by `python -m tests.migration_faults`."""

from __future__ import annotations

import random

from .moving import Trial, outcome
from .simulated import Fault, Killed

HOW = ("before it sends", "after it has sent", "lost")
PHASES = ("agreeing", "ahead", "forward", "leaving", "vote")


def phase(what: str) -> str:
    """Of a move, by what a message is for."""
    if what.startswith("moving shards: what every rank has"):
        return "vote"
    if what.startswith("copying shards ahead"):
        return "ahead"
    if what.startswith("moving shards to other ranks"):
        return "agreeing"
    return "leaving" if what.startswith("moving shards") else "forward"


_known: dict[str, list[str]] = {}


def phases_of(trial: Trial) -> list[str]:
    """Of every message of the move, from a run without a fault. The trial is used up, unless one like it was asked for before."""
    if str(trial) not in _known:
        _known[str(trial)] = _phases(trial)
    return _known[str(trial)]


def _phases(trial: Trial) -> list[str]:
    network, _ = trial.prepared()
    assert all(ended is None for ended in trial.move(network, None))
    return [phase(what) for what in network.said]


def at_message(trial: Trial, message: int, how: str, *, rank: int | None = None, deaf: tuple[int, ...] = ()) -> dict:
    """how: of HOW; "lost": the message does not reach `deaf`, or one rank, and nobody dies.

    Raises: AssertionError for a mixed state or a lost entry, Hang.
    """
    network, before = trial.prepared()
    rank = message % trial.world if rank is None else rank
    fault = Fault(message, rank, how != HOW[0], deaf) if how != "lost" else Fault(message, None, True, deaf or (rank,))
    ended = trial.move(network, fault)
    where = phase(network.said[message])
    in_doubt = sum(one.migration.in_doubt is not None for at, one in trial.caches.items() if not isinstance(ended[at], Killed))
    return {
        "world": trial.world, "block": trial.block, "requests": trial.requests, "ahead": trial.ahead, "seed": trial.seed,
        "message": message, "how": how, "rank": rank, "phase": where, "in_doubt": in_doubt,
        "outcome": outcome(trial, ended, None if where == "forward" else before),
    }  # fmt: skip


def random_trial(seed: int) -> dict:
    """A drawn move with a fault at a drawn message, phases as likely as each other."""
    draw = random.Random(seed)
    phases = phases_of(Trial.drawn(seed))
    wanted = draw.choice(sorted(set(phases)))
    message = draw.choice([i for i, each in enumerate(phases) if each == wanted])
    trial = Trial.drawn(seed)
    rank = draw.randrange(trial.world)
    others = [each for each in range(trial.world) if each != rank]
    how = draw.choice(HOW)
    deaf = tuple(draw.sample(others, draw.randrange(len(others) + 1))) if how == HOW[1] else ()
    return at_message(trial, message, how, rank=rank, deaf=deaf)
