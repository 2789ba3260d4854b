"""Random cases, and the file of their results: a letter for each case, so that it can be gone on with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
import transformers

from .cases import names_what_it_refuses
from .drive import outcomes
from .programs import case_of

LETTERS = {"served": "s", "refused": "r", "same error": "e", "tie": "t"}
AT_ONCE = 25


def is_right(case: dict, outcome: dict) -> bool:
    return outcome["status"] in LETTERS and (outcome["status"] != "refused" or names_what_it_refuses(case, outcome["says"]))


def run_random(count: int, all_ranks: list[int], file: Path | None) -> int:
    """How many are wrong. Case n runs on the number of ranks at place n modulo of all_ranks."""
    results = json.loads(file.read_text()) if file is not None and file.exists() else {"done": {}, "bad": {}, "refusals": {}}
    places = list(enumerate(all_ranks))
    while places:
        place, ranks = places.pop(0)
        done, seeds = results["done"].get(str(ranks), ""), range(place, count, len(all_ranks))
        if len(done) >= len(seeds):
            continue
        places.append((place, ranks))
        chosen = {str(seed): case_of(seed, ranks) for seed in seeds[len(done) : len(done) + AT_ONCE]}
        found = dict(outcomes(chosen, ranks))
        for seed, case in chosen.items():
            outcome = found[seed]
            right = is_right(case, outcome)
            done += LETTERS[outcome["status"]] if right else "w"
            if not right:
                results["bad"][f"{seed} on {ranks}"] = outcome["says"][-300:]
            elif outcome["status"] == "refused":
                says = outcome["says"].splitlines()[0][:60]
                results["refusals"][says] = results["refusals"].get(says, 0) + 1
        results["done"][str(ranks)] = done
        tally = {letter: done.count(letter) for letter in "strew"}
        print(f"{ranks} ranks: {len(done)} of {len(seeds)}: {tally}", flush=True)
        if file is not None:
            file.write_text(_text(results, count, all_ranks, file), encoding="utf-8")
    return len(results["bad"])


def _text(results: dict, count: int, all_ranks: list[int], file: Path) -> str:
    letters = Counter("".join(results["done"].values()))
    options = f"--random {count} --ranks {','.join(map(str, all_ranks))} --json docs/results/{file.name}"
    head = {
        "command": f"python -m tests.generate_options {options}",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "cases": sum(letters.values()),
        "served": letters["s"],
        "another choice between two that are alike for plain": letters["t"],
        "refused by name": letters["r"],
        "raise as plain does": letters["e"],
        "wrong or hung": letters["w"],
    }
    return json.dumps({**head, **{name: results[name] for name in ("bad", "refusals", "done")}}, indent=1) + "\n"
