"""Recall of facts hidden in prose, by greedy generation: pass keys and values of keys, at depths spread over the prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pikv_ds.bundled.recall import KINDS, Prose, RecallPrompt, recall_prompt
from pikv_ds.errors import ConfigError

from .backend import Backend, Memory, Session, first_of
from .spec import EvalSpec


class Answer(NamedTuple):
    kind: str
    depth: float
    found: bool


def measure_recall(
    backend: Backend, spec: EvalSpec, prose: Prose, block: dict[str, Any] | None, advance: Callable
) -> tuple[tuple[list[Answer], list[float]], Memory, int]:
    """(answers, milliseconds of decode steps) of this rank; the cache after its first batch, and the tokens in it.

    The prompt is fed in chunks, then one token at a time; prompt and answer together are `context` tokens.
    """
    prompts = _prompts(spec, prose)
    if spec.requests == "distinct":
        prompts = prompts[backend.data_rank :: spec.data_ranks]
    answers, step_ms, memories = [], [], []
    new_tokens = prose.answer_tokens()
    for start in range(0, len(prompts), spec.batch):
        part = prompts[start : start + spec.batch]
        with backend.session(block, len(part), spec.context) as session:
            texts, memory = _generate(session, [prompt.ids for _, prompt in part], new_tokens, spec.chunk, step_ms, backend.tokenizer)
            memories.append(memory)
        answers += [
            Answer(kind, prompt.depth, text.strip().startswith(prompt.answer)) for (kind, prompt), text in zip(part, texts, strict=True)
        ]
        advance(len(part))
    return (answers, step_ms), first_of(memories), min(spec.batch, len(prompts)) * (spec.context - 1)


def _prompts(spec: EvalSpec, prose: Prose) -> list[tuple[str, RecallPrompt]]:
    """Kinds in turn, depths spread evenly over those of a kind."""
    prompts, length = [], spec.context - prose.answer_tokens()
    per_kind = max(spec.samples // len(KINDS), 1)
    for idx in range(spec.samples):
        kind, depth = KINDS[idx % len(KINDS)], min((idx // len(KINDS) + 0.5) / per_kind, 1.0)
        try:
            prompts.append((kind, recall_prompt(prose, length, kind=kind, depth=depth, seed=spec.seed + idx)))
        except ValueError as error:
            raise ConfigError(f"--context {spec.context} for task recall: {error}") from None
    return prompts


def _generate(
    session: Session, prompts: list[list[int]], new_tokens: int, chunk: int, step_ms: list[float], tokenizer: Any
) -> tuple[list[str], Memory]:
    """Continuations of the prompts; the cache after them, counted from the last chunk of the prompt on, which holds the question."""
    ids = torch.tensor(prompts)
    for start in range(0, ids.shape[1], chunk):
        if start + chunk >= ids.shape[1]:
            before = session.memory()
            session.watch(True)
        logits = session.feed(ids[:, start : start + chunk])
    session.watch(False)
    chosen = [logits[:, -1].argmax(-1, keepdim=True).cpu()]
    while len(chosen) < new_tokens:
        started = time.perf_counter()
        chosen.append(session.feed(chosen[-1])[:, -1].argmax(-1, keepdim=True).cpu())  # reading the token ends the step on any device
        step_ms.append(1e3 * (time.perf_counter() - started))
    return [tokenizer.decode(row) for row in torch.cat(chosen, 1)], session.memory().counted_from(before)
