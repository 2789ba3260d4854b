"""One fault in one move: where it fell, and what became of the move. Used by the tests and by `python -m tests.migration_faults`."""

from __future__ import annotations

import random

from pikv_ds.errors import PeerError

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


def phases_of(trial: Trial) -> list[str]:
    """Of every message of the move, from a run without a fault."""
    network, _ = trial.prepared()
    assert all(ended is None for ended in trial.move(network, None))
    return [phase(what) for what in network.said]


def at_message(
    trial: Trial, message: int, how: str, *, among: str | None = None, rank: int | None = None, deaf: tuple[int, ...] = ()
) -> dict | None:
    """how: of HOW; "lost": the message does not reach `deaf`, or one rank, and nobody dies. among: a phase, whose messages are counted.

    Returns: None when there was no such message. Raises: AssertionError for a mixed state or a lost entry, Hang.
    """
    network, before = trial.prepared()
    rank = message % trial.world if rank is None else rank
    victim, deaf = (rank, deaf) if how != "lost" else (None, deaf or (rank,))
    fault = Fault(message, victim, how != HOW[0], deaf, None if among is None else lambda what: phase(what) == among)
    ended = trial.move(network, fault)
    if not network.happened:
        return None
    where = among or phase(network.said[message])
    in_doubt = sum(one.migration.in_doubt is not None for at, one in trial.caches.items() if not isinstance(ended[at], Killed))
    return {
        "world": trial.world, "block": trial.block, "requests": trial.requests, "ahead": trial.ahead, "seed": trial.seed,
        "message": message, "how": how, "rank": rank, "phase": where, "in_doubt": in_doubt,
        "outcome": outcome(trial, ended, before, _in_a_forward(ended)),
    }  # fmt: skip


def _in_a_forward(ended: list) -> set[int]:
    """Ranks whose forward broke off: they have stored some of its entries."""
    said = {rank: str(how).partition(": ")[2] for rank, how in enumerate(ended) if isinstance(how, PeerError)}
    return {rank for rank, what in said.items() if phase(what) == "forward"}


def random_trial(seed: int) -> dict:
    """A drawn move with a fault at a drawn message, phases as likely as each other."""
    draw, trial = random.Random(f"fault {seed}"), Trial.drawn(seed)
    wanted = draw.choice([each for each in PHASES if trial.ahead is not None or each not in ("ahead", "forward")])
    message = draw.randrange({"agreeing": 1, "vote": 1, "leaving": 3, "ahead": 6, "forward": 9}[wanted])
    rank = draw.randrange(trial.world)
    others = [each for each in range(trial.world) if each != rank]
    how = draw.choice(HOW)
    deaf = tuple(draw.sample(others, draw.randrange(len(others) + 1))) if how == HOW[1] else ()
    said = at_message(trial, message, how, among=wanted, rank=rank, deaf=deaf)
    return said or at_message(Trial.drawn(seed), 0, how, among=wanted, rank=rank, deaf=deaf)
