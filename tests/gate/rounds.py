"""One interleaved run of a configuration: three sides in turns, so that drift of the machine meets all of them alike.

base and current give the ratio; base and twin, the base once more in a process of its own, give the same ratio where nothing was changed.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.gate.sides import Block, Side
from tests.gate.verdict import Interval, median_interval

SIDES = ("base", "twin", "current")
LAUNCHES, LEAST_PAIRS = 3, 10  # starts of a run, and rounds that make one worth while


@dataclass(frozen=True)
class Rounds:
    """pairs: per side, what it took in every round."""

    pairs: dict[str, list[Block]]

    def ratios(self, side: str, clock: str) -> list[float]:
        """side / base of every round; clock: "wall_ms" or "cpu_ms"."""
        pairs = zip(self.pairs[side], self.pairs["base"], strict=True)
        return [getattr(own, clock) / getattr(base, clock) for own, base in pairs]

    def interval(self, side: str, clock: str = "wall_ms") -> Interval:
        return median_interval(self.ratios(side, clock))

    def same_output(self, side: str) -> bool:
        """Its outputs are those of the base, bit for bit: both did the same work."""
        return all(own.digest == base.digest for own, base in zip(self.pairs[side], self.pairs["base"], strict=True))


def order(rng: random.Random) -> tuple[str, ...]:
    """Whose turn it is in one round: the sides as drawn, then in reverse (ABBA). What drifts evenly meets all of them alike."""
    drawn = tuple(rng.sample(SIDES, len(SIDES)))
    return drawn + drawn[::-1]


def launches(pairs: int) -> list[int]:
    """Rounds of each launch. How fast a process is depends on where its memory lies, for as long as it lives: so new ones are started."""
    number = max(1, min(LAUNCHES, pairs // LEAST_PAIRS))
    return [pairs // number + (idx < pairs % number) for idx in range(number)]


def measure(
    decode: str, trees: dict[str, Path], *, pairs: int, steps: int, seed: int = 0, after_round: Callable[[], None] = lambda: None
) -> Rounds:
    """Start the sides, let them take turns, end them; as many times as `launches` says. trees: of every side; steps: of one turn.

    Raises: WorkerFailed.
    """
    rng, rounds = random.Random(seed), Rounds({name: [] for name in SIDES})
    for number in launches(pairs):
        with tempfile.TemporaryDirectory(prefix="pikv_gate_logs_") as logs, ExitStack() as stack:
            sides = {name: stack.enter_context(Side(name, trees[name], decode, Path(logs))) for name in SIDES}
            for side in sides.values():
                side.ready()
            for _ in range(number):
                _play(sides, order(rng), steps, rounds)
                after_round()
    return rounds


def _play(sides: dict[str, Side], turns: tuple[str, ...], steps: int, rounds: Rounds) -> None:
    """One round: two turns of every side."""
    taken: dict[str, list[Block]] = {name: [] for name in sides}
    for name in turns:
        taken[name].append(sides[name].block(steps))
    for name, (first, second) in taken.items():
        rounds.pairs[name].append(first.joined(second))
