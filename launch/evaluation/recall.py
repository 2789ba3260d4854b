"""Recall by greedy generation: of facts hidden in prose (task recall), and what else prompts ask for (ruler.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pikv_ds.bundled.recall import KINDS, Prose, recall_prompt
from pikv_ds.errors import ConfigError

from .asked import Asked, text_of
from .backend import Backend, Memory, Session, first_of
from .spec import EvalSpec, pieces


class Answer(NamedTuple):
    kind: str
    depth: float | None
    found: float  # share of what was asked for
    found_after: float | None  # with the question appended after eviction; None: nothing is evicted


def measure_recall(
    backend: Backend, spec: EvalSpec, prose: Prose, block: dict[str, Any] | None, advance: Callable
) -> tuple[tuple[list[Answer], list[float]], Memory, int]:
    """Task recall: see measure_answers."""
    return measure_answers(backend, spec, recall_prompts(spec, prose), block, advance)


def measure_answers(
    backend: Backend, spec: EvalSpec, prompts: list[Asked], block: dict[str, Any] | None, advance: Callable
) -> tuple[tuple[list[Answer], list[float]], Memory, int]:
    """(answers, milliseconds of decode steps) of this rank; the cache after its first batch, and the tokens in it.

    The prompt is fed in chunks, then one token at a time; prompt and answer together are `context` tokens. When entries are evicted, at
    least the last token of the prompt is fed by itself, so that every token of an answer is read from what was kept: once with the rest
    of the question visible to the policy, once with the question appended, token by token, to a prompt that was evicted without it.
    """
    if spec.requests == "distinct":
        prompts = prompts[backend.data_rank :: spec.data_ranks]
    answers, step_ms, memories = [], [], []
    evicts = backend.evicts(block)
    for start in range(0, len(prompts), spec.batch):
        part = prompts[start : start + spec.batch]
        question = max(prompt.question_tokens for prompt in part)
        texts: list[list[str]] = []
        for held_back in (1, question) if evicts else (0,):
            with backend.session(block, len(part), spec.context) as session:
                found, memory = _generate(session, part, held_back, spec, step_ms, backend.tokenizer)
            texts.append(found)
            memories.append(memory)
        for prompt, *said in zip(part, *texts, strict=True):
            found = [prompt.score(text) for text in said]
            answers.append(Answer(prompt.kind, prompt.depth, found[0], found[1] if evicts else None))
        advance(len(part))
    return (answers, step_ms), first_of(memories), min(spec.batch, len(prompts)) * (spec.context - 1)


def recall_prompts(spec: EvalSpec, prose: Prose) -> list[Asked]:
    """Kinds in turn, depths spread evenly over those of a kind."""
    new_tokens = prose.answer_tokens()
    prompts, length = [], spec.context - new_tokens
    per_kind = max(spec.samples // len(KINDS), 1)
    for idx in range(spec.samples):
        kind, depth = KINDS[idx % len(KINDS)], min((idx // len(KINDS) + 0.5) / per_kind, 1.0)
        try:
            made = recall_prompt(prose, length, kind=kind, depth=depth, seed=spec.seed + idx)
        except ValueError as error:
            raise ConfigError(f"--context {spec.context} for task recall: {error}") from None
        prompts.append(Asked(kind, made.ids, (made.answer,), made.depth, made.question_tokens, new_tokens, starts=True))
    return prompts


def _generate(
    session: Session, prompts: list[Asked], held_back: int, spec: EvalSpec, step_ms: list[float], tokenizer: Any
) -> tuple[list[str], Memory]:
    """Continuations of the prompts, the last `held_back` tokens of which are fed one by one; the cache after them, counted from the last
    chunk of the prompt on, which holds the question."""
    ids, new_tokens = torch.tensor([prompt.ids for prompt in prompts]), prompts[0].new_tokens
    ids, alone = ids.tensor_split([ids.shape[1] - held_back], 1)
    length = ids.shape[1]
    session.expect(length)
    # Without prefill_chunk all forwards are chunks; with it the question is in chunks, and what comes before it in long forwards.
    small_from = length - max(1, prompts[0].question_tokens - held_back) if spec.prefill_chunk else 0
    for start, end in [(0, length)] if session.whole else pieces(length, spec, small_from):
        if end == length:
            before = session.memory()
            session.watch(True)
        logits = session.feed(ids[:, start:end], last=True)
    for column in alone.split(1, 1) if held_back else ():
        logits = session.feed(column)
    session.watch(False)
    chosen = [logits[:, -1].argmax(-1, keepdim=True).cpu()]
    while len(chosen) < new_tokens:
        started = time.perf_counter()
        chosen.append(session.feed(chosen[-1])[:, -1].argmax(-1, keepdim=True).cpu())  # reading the token ends the step on any device
        step_ms.append(1e3 * (time.perf_counter() - started))
    return [text_of(tokenizer, row) for row in torch.cat(chosen, 1).tolist()], session.memory().counted_from(before)
