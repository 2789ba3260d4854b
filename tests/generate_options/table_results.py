"""docs/results/generate_options.json: what became of every try of the table, and of the random cases."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from .cases import PLAIN_TOO
from .drive import outcomes
from .table import SETTINGS, TRIES, cases

FILE = Path(__file__).resolve().parents[2] / "docs" / "results" / "generate_options.json"
COMMAND = "python -m tests.generate_options --table"
OUTCOMES = {"served": "served", "refused": "refused", "same error": "raises, as without PiKV"}


def run_table() -> dict[str, dict]:
    """The outcome of each try, by the name of its case."""
    found = {}
    for ranks in dict.fromkeys(ranks for ranks, _ in SETTINGS):
        chosen = {name: case for name, case in cases().items() if len(case["ranks"]) == ranks}
        found |= dict(outcomes(chosen, ranks))
    return found


def kept(found: dict[str, dict]) -> dict:
    """What the file has: says is the first line, of refusals and errors only."""
    rows = {
        name: {"status": one["status"]} | ({} if one["status"] == "served" else {"says": one["says"].splitlines()[0][:300]})
        for name, one in sorted(found.items())
    }
    return {"command": COMMAND, "transformers": transformers.__version__, "torch": torch.__version__, "tries": rows}


def written(found: dict[str, dict]) -> str:
    return json.dumps(kept(found), indent=1) + "\n"


def of_option(results: dict, option: str) -> list[dict]:
    """What became of each try of an option: {"options", "status", "says"}, the same in all settings where possible, else that of each."""
    rows = []
    for number, options in enumerate(TRIES[option]):
        names = {f"{ranks} rank{'s' * (ranks > 1)}, {requests}": f"{option}/{number}/{ranks}/{requests}" for ranks, requests in SETTINGS}
        tried = {at: results["tries"][name] for at, name in names.items() if name in results["tries"]}
        what = {at: OUTCOMES.get(one["status"], one["status"]) for at, one in tried.items()}
        first = next(iter(what.values()))
        if len(set(what.values())) > 1:
            first = "; ".join(f"{at}: {each}" for at, each in what.items())
        said = next((one["says"] for one in tried.values() if "says" in one), "")
        rows.append({"options": options, "status": first, "says": said.removeprefix(PLAIN_TOO)})
    return rows
