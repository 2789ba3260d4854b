"""Perplexity of the last half of windows of text, fed in chunks, against the dense cache on the same windows in the same chunks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pikv_ds.bundled.recall import Prose
from pikv_ds.errors import ConfigError

from .backend import Backend, Memory, Session, first_of
from .spec import EvalSpec, pieces, scored_queries

MOST_KEPT = 1 << 30  # bytes
_KEPT: WeakKeyDictionary[Any, tuple[EvalSpec, dict[int, tuple[Tensor, Memory]]]] = WeakKeyDictionary()


class PplSums(NamedTuple):
    """Sums over scored tokens, in nats. dense_nll: of the host's cache; kl: from it to the measured one."""

    tokens: int
    nll: float
    dense_nll: float
    kl: float


def measure_ppl(
    backend: Backend, spec: EvalSpec, prose: Prose, block: dict[str, Any] | None, advance: Callable
) -> tuple[PplSums, Memory, int]:
    """Sums over this rank's windows; the cache after its first batch, and the tokens in it."""
    windows = windows_of(spec, prose, backend.data_rank)
    sums, memories = [], []
    for start in range(0, len(windows), spec.batch):
        ids = windows[start : start + spec.batch]
        targets = ids[:, [query + 1 for query in scored_queries(spec.context, spec.scored)]]
        dense, memory = _dense(backend, spec, ids, start)
        own = dense
        if block is not None:
            with backend.session(block, len(ids), spec.context) as session:
                own, memory = _scored_log_probs(session, ids, spec)
        kl = (dense.exp() * (dense - own)).sum(dtype=torch.float64).item()
        sums.append(PplSums(targets.numel(), _nll(own, targets), _nll(dense, targets), kl))
        memories.append(memory)
        advance(len(ids))
    return PplSums(*map(sum, zip(*sums, strict=True))), first_of(memories), min(spec.batch, len(windows)) * spec.context


def _dense(backend: Backend, spec: EvalSpec, ids: Tensor, start: int) -> tuple[Tensor, Memory]:
    """Scored log-probabilities by the host's cache: the same for every configuration of a run, so they are kept while they are small."""
    run, kept = _KEPT.get(backend.model, (None, {}))
    if run != spec:
        _KEPT[backend.model] = spec, (kept := {})
    if start not in kept:
        with backend.session(None, len(ids), spec.context) as session:
            found = _scored_log_probs(session, ids, spec)
        if found[0].nbytes + sum(log_probs.nbytes for log_probs, _ in kept.values()) > MOST_KEPT:
            return found
        kept[start] = found
    return kept[start]


def windows_of(spec: EvalSpec, prose: Prose, data_rank: int) -> Tensor:
    """[N, context] int64: windows without overlap, drawn by the seed; with distinct requests, those of this data rank."""
    body = spec.context - len(prose.prefix)
    available = len(prose.ids) // body
    if spec.samples > available:
        raise ConfigError(
            f"--samples {spec.samples}: the text has {len(prose.ids):,} tokens, "
            f"{available} windows of {spec.context}; use fewer or another --text"
        )
    starts = sorted(random.Random(spec.seed).sample(range(available), spec.samples))
    windows = torch.tensor([prose.prefix + prose.ids[start * body : (start + 1) * body] for start in starts])
    return windows[data_rank :: spec.data_ranks] if spec.requests == "distinct" else windows


def _scored_log_probs(session: Session, ids: Tensor, spec: EvalSpec) -> tuple[Tensor, Memory]:
    """[B, scored, V] f32 log-probabilities of the scored queries; the cache then, counted over their chunks. What comes before the first
    of these chunks is the prompt."""
    scored = scored_queries(spec.context, spec.scored)
    kept = []
    parts = pieces(spec.context, spec, scored.start)
    if session.whole:  # all before the first scored chunk at once
        first = next(start for start, end in parts if end > scored.start)
        parts = [(0, first), *((start, end) for start, end in parts if start >= first)]
    session.expect(next(start for start, end in parts if end > scored.start))
    for start, end in parts:
        if end <= scored.start:
            session.feed(ids[:, start:end], last=True)
            continue
        if not kept:
            before = session.memory()
            session.watch(True)
        logits = session.feed(ids[:, start:end])
        kept.append(logits[:, max(scored.start - start, 0) : max(scored.stop - start, 0)].log_softmax(-1).cpu())
    return torch.cat(kept, 1), session.memory().counted_from(before)


def _nll(log_probs: Tensor, targets: Tensor) -> float:
    return -log_probs.gather(-1, targets.unsqueeze(-1)).sum(dtype=torch.float64).item()
