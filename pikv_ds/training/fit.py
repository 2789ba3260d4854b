"""The loop: windows in, weights out. It knows no host, no optimizer and no file format of a part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pikv_ds.errors import TrainingError

from . import checkpoint
from .engine import Engine
from .order import generator_at, window_at
from .part import LearnedPart
from .recorded import Window, Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPlan:
    """steps: of the optimizer. windows_per_step: on each rank. patience: evaluations without a better one, 0 = never stop early."""

    steps: int
    seed: int = 0
    windows_per_step: int = 1
    every: int = 25
    """Steps between held-out evaluations and checkpoints."""
    patience: int = 0
    folder: Path | None = None
    """Of checkpoints and of the batch of a loss that is not finite; None = nothing is written."""
    resume: bool = False


@dataclass(slots=True)
class Fitted:
    """curve: one row a step, with the held-out figures where there are any; best: the row whose weights these are."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def fit(
    part: LearnedPart,
    engine: Engine,
    data: Windows,
    held_out: Windows,
    plan: FitPlan,
    told: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:
    """Train until the steps are done, or until the held-out objective has not risen for `patience` evaluations. By all ranks alike.

    told: of every row of the curve, as it comes. Raises: TrainingError for no data, a loss that is not finite (its batch is in
    plan.folder), a checkpoint of another fit.
    """
    _check_data(part, data, held_out)
    found, same = Fitted(), _same(part, engine, data, plan)
    if plan.resume:
        _go_on(found, engine, plan, same)
    begun = time.monotonic() - found.seconds
    for step in range(len(found.curve), plan.steps):
        row = {"step": step, **_train(part, engine, data, plan, step)}
        last = step + 1 == plan.steps
        due = (step + 1) % plan.every == 0 or last
        if due:
            row |= {f"held_out_{name}": value for name, value in evaluate(engine, held_out).items()}
        found.curve.append(row)
        if due and (not found.best or row["held_out_objective"] > found.best["held_out_objective"]):
            found.best, found.weights = row, engine.weights()
        found.seconds = time.monotonic() - begun
        if due and plan.folder is not None:
            state = same | {"step": step + 1, "curve": found.curve, "best": found.best, "seconds": found.seconds}
            checkpoint.save(plan.folder, engine, state, found.weights)
        if told is not None:
            told(row)
        if due and plan.patience and step - found.best["step"] >= plan.patience * plan.every:
            break
    return found


def evaluate(engine: Engine, held_out: Windows) -> dict[str, float]:
    """Means over the windows, those of a rank in turn; every rank has the same number, the last ones twice if need be."""
    turns, sums = math.ceil(len(held_out) / engine.world), []
    for turn in range(turns):
        window = held_out[(turn * engine.world + engine.rank) % len(held_out)]
        found = engine.loss(window, None)
        sums.append(torch.stack([x.detach().double().cpu() for x in found.values()]))
        names = list(found)
    return dict(zip(names, engine.mean(torch.stack(sums).mean(0)).tolist(), strict=True))


def _train(part: LearnedPart, engine: Engine, data: Windows, plan: FitPlan, step: int) -> dict[str, float]:
    """One step of the optimizer. -> means over windows and ranks."""
    generator, rows = generator_at(plan.seed, step, engine.rank), []
    for turn in range(plan.windows_per_step):
        place = (step * plan.windows_per_step + turn) * engine.world + engine.rank
        index = window_at(plan.seed, len(data), place)
        window = data[index]
        found = engine.loss(window, generator)
        row = engine.mean(torch.stack([x.detach().double().cpu() for x in found.values()]))
        if not bool(torch.isfinite(row).all()):  # of all ranks, so all stop
            raise TrainingError(_stopped(part, plan, step, index, window, dict(zip(found, row.tolist(), strict=True))))
        engine.backward(found["loss"], plan.windows_per_step)
        rows.append(row)
    engine.step()
    return dict(zip(found, torch.stack(rows).mean(0).tolist(), strict=True))


def _stopped(part: LearnedPart, plan: FitPlan, step: int, index: int, window: Window, values: dict[str, float]) -> str:
    said = f"training of {part.name!r} stopped: in step {step} (window {index}) not all is finite: {values}"
    if plan.folder is None:
        return said
    plan.folder.mkdir(parents=True, exist_ok=True)
    tensors = {"ids": window.ids, "question": window.question}
    for i, layer in enumerate(window.layers):
        tensors |= {f"{i}.{name}": getattr(layer, name) for name in ("q", "k", "v", "hidden")}
    file = plan.folder / f"not_finite_step_{step}.safetensors"
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, file)
    return f"{said}; the batch is in {file.name}. Lower the rate, or look at that window"


def _check_data(part: LearnedPart, data: Windows, held_out: Windows) -> None:
    for what, windows in (("to train on", data), ("held out", held_out)):
        if not len(windows):
            raise TrainingError(
                f"no window {what}: the text is empty, or shorter than two windows; give a longer text or a shorter --context"
            )
    if part.wants_questions and not any(bool(data[i].question.any()) for i in range(len(data))):
        raise TrainingError(f"{part.name!r} learns from questions and no window has one: give prompts that ask (--facts)")


def _same(part: LearnedPart, engine: Engine, data: Windows, plan: FitPlan) -> dict[str, Any]:
    return {
        "part": part.name, "options": part.options(), "seed": plan.seed, "world": engine.world, "windows": len(data), "engine": engine.name,
        "steps": plan.steps,
    }  # fmt: skip


def _go_on(found: Fitted, engine: Engine, plan: FitPlan, same: dict[str, Any]) -> None:
    if plan.folder is None:
        raise TrainingError("a fit without a folder of checkpoints can't be resumed")
    state, found.weights = checkpoint.load(plan.folder, engine, same)
    found.curve, found.best, found.seconds = state["curve"], state["best"], state["seconds"]
