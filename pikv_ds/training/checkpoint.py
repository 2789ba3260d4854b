"""What a fit goes on from after it was killed: written beside, then put in place, so that one of the last two is always whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pikv_ds.errors import TrainingError

from .engine import Engine

LATEST, STATE, BEST = "latest", "fit.json", "best.safetensors"
FIXED = ("part", "options", "seed", "world", "windows", "engine", "steps")
"""What must be as it was."""


def save(folder: Path, engine: Engine, state: dict[str, Any], best: dict[str, Tensor]) -> None:
    """state: JSON values, "step" among them. By all ranks; the first writes what is the same on all."""
    own = folder / f"step_{state['step']}"
    own.mkdir(parents=True, exist_ok=True)
    engine.save(own)
    if not engine.writes:
        return
    if best:
        save_file(best, own / BEST)
    (own / STATE).write_text(json.dumps(state), encoding="utf-8")
    (folder / f"{LATEST}.new").write_text(own.name, encoding="utf-8")
    os.replace(folder / f"{LATEST}.new", folder / LATEST)
    kept = sorted(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))[-2:]
    for old in set(folder.glob("step_*")) - {*kept, own}:
        shutil.rmtree(old)


def load(folder: Path, engine: Engine, expected: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state and the best weights that `save` was given last. Raises: TrainingError, by the name of what is not as it was."""
    if not (folder / LATEST).is_file():
        raise TrainingError(f"there is no checkpoint of a fit in {folder.name!r} to resume; begin without --resume")
    own = folder / (folder / LATEST).read_text(encoding="utf-8")
    state = json.loads((own / STATE).read_text(encoding="utf-8"))
    for name in FIXED:
        if state[name] != expected[name]:
            what = "ranks (world size)" if name == "world" else name
            raise TrainingError(
                f"the checkpoint in {folder.name!r} is of a fit with {what} = {state[name]!r}, this one has {expected[name]!r}: resume it "
                f"as it was begun, or begin anew in another folder"
            )
    engine.load(own)
    return state, load_file(own / BEST) if (own / BEST).is_file() else {}
