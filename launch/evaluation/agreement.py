"""Greedy agreement: how often the measured cache chooses the token that the dense cache chose, after the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pikv_ds.bundled.recall import Prose
from pikv_ds.errors import ConfigError

from .backend import Backend, Memory, Session, first_of
from .ppl import windows_of
from .spec import EvalSpec, pieces

CHOSEN = 128  # tokens per window
_DENSE: WeakKeyDictionary[Any, tuple[EvalSpec, dict[int, Tensor]]] = WeakKeyDictionary()


class Agreed(NamedTuple):
    """Of one window: tokens chosen alike, and those before the first that was not: so long the texts would be the same."""

    alike: int
    until_first: int


def measure_agreement(
    backend: Backend, spec: EvalSpec, prose: Prose, block: dict[str, Any] | None, advance: Callable
) -> tuple[list[Agreed], Memory, int]:
    """The first context - CHOSEN tokens of each window are the prompt. What dense chooses is fed, so one other token does not spoil the
    rest; the first difference is where two texts would part."""
    if spec.context <= 2 * CHOSEN:
        raise ConfigError(f"--context {spec.context} for task agreement: {CHOSEN} tokens follow the prompt; use {2 * CHOSEN + 1} or more")
    windows = windows_of(spec, prose, backend.data_rank)[:, : spec.context - CHOSEN]
    found, memories = [], []
    for start in range(0, len(windows), spec.batch):
        ids = windows[start : start + spec.batch]
        chosen, memory = _dense(backend, spec, ids, start)
        own = chosen
        if block is not None:
            with backend.session(block, len(ids), spec.context) as session:
                own, memory = _choose(session, ids, spec, chosen)
        same = own == chosen
        found += [Agreed(int(row.sum()), int(row.cumprod(0).sum())) for row in same.int()]
        memories.append(memory)
        advance(len(ids))
    return found, first_of(memories), min(spec.batch, len(windows)) * (spec.context - 1)


def _dense(backend: Backend, spec: EvalSpec, ids: Tensor, start: int) -> tuple[Tensor, Memory]:
    """[B, CHOSEN] int64, what the host's cache chooses: once for all configurations of a run."""
    run, kept = _DENSE.get(backend.model, (None, {}))
    if run != spec:
        _DENSE[backend.model] = spec, (kept := {})
    if start not in kept:
        with backend.session(None, len(ids), spec.context) as session:
            kept[start] = _choose(session, ids, spec, None)
    return kept[start]


def _choose(session: Session, ids: Tensor, spec: EvalSpec, given: Tensor | None) -> tuple[Tensor, Memory]:
    """[B, CHOSEN] int64 chosen after the prompt and those of `given` before each, None = those chosen; the cache, counted from there."""
    session.expect(ids.shape[1])
    for start, end in [(0, ids.shape[1])] if session.whole else pieces(ids.shape[1], spec, ids.shape[1] - 1):
        logits = session.feed(ids[:, start:end], last=True)
    before = session.memory()
    chosen = [logits[:, -1].argmax(-1, keepdim=True).cpu()]
    for step in range(CHOSEN - 1):
        follows = chosen[-1] if given is None else given[:, step : step + 1]
        chosen.append(session.feed(follows)[:, -1].argmax(-1, keepdim=True).cpu())
    return torch.cat(chosen, 1), session.memory().counted_from(before)
