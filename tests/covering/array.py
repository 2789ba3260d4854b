"""The array: greedy, seeded, so that it is the same whenever it is made. A case is a choice of one value for every setting."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from .settings import SETTINGS, Case, defaults

Pair = tuple[str, object, str, object]
FILLS = 12  # ways to fill up a pair that are compared by the pairs they cover besides
TRIES = 60  # ways to fill it up before it counts as one that nothing helps


def all_pairs() -> Iterator[Pair]:
    for (a, values), (b, others) in itertools.combinations(SETTINGS.items(), 2):
        for x, y in itertools.product(values, others):
            yield a, x, b, y


def pairs_of(case: Case) -> set[Pair]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(SETTINGS, 2)}


def cover(refusal: Callable[[Case], str | None], seed: int = 0) -> tuple[list[Case], list[tuple[Case, str]]]:
    """refusal(case) -> the rule that refuses it, or None.

    Returns: cases that run and cover every pair that can; for each other pair a case with it, otherwise the default, and its rule.
    """
    draw, known = random.Random(seed), {}

    def refused(case: Case) -> str | None:
        key = tuple(case.values())
        if key not in known:
            known[key] = refusal(case)
        return known[key]

    left, runs, out = dict.fromkeys(all_pairs()), [], []
    while left:
        a, x, b, y = next(iter(left))
        case = _best(_fills({a: x, b: y}, draw), left, refused)
        if case is None:
            alone = defaults() | {a: x, b: y}
            out.append((alone, refused(alone)))
            del left[a, x, b, y]
            continue
        case = _improved(case, {a, b}, left, refused, draw)
        runs.append(case)
        for pair in pairs_of(case):
            left.pop(pair, None)
    return runs, out


def _fills(fixed: Case, draw: random.Random) -> Iterator[Case]:
    """The default around what is fixed, then more and more of it drawn, then again little."""
    yield defaults() | fixed
    for i in range(1, TRIES):
        share = (i % FILLS) / FILLS
        drawn = {name: draw.choice(values) for name, values in SETTINGS.items() if draw.random() < share}
        yield defaults() | drawn | fixed


def _best(fills: Iterator[Case], left: dict, refused: Callable) -> Case | None:
    """Of the first FILLS that run, the one with the most pairs that are left."""
    runs = itertools.islice((case for case in fills if refused(case) is None), FILLS)
    return max(runs, key=lambda case: sum(pair in left for pair in pairs_of(case)), default=None)


def _improved(case: Case, fixed: set[str], left: dict, refused: Callable, draw: random.Random) -> Case:
    """Setting after setting, in a drawn order, takes the value with the most pairs that are left and still runs."""
    names = [name for name in SETTINGS if name not in fixed]
    draw.shuffle(names)
    for name in names:
        gain = {value: sum(pair in left for pair in pairs_of(case | {name: value})) for value in SETTINGS[name]}
        for value in sorted(gain, key=gain.get, reverse=True):
            if gain[value] <= gain[case[name]]:
                break
            if refused(case | {name: value}) is None:
                case = case | {name: value}
                break
    return case
