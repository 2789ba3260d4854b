"""Recall of facts hidden in prose, by greedy generation: pass keys and values of keys, at depths spread over the prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pikv_ds.bundled.recall import KINDS, Prose, RecallPrompt, recall_prompt
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError

from .backend import Backend, Memory, Session, first_of
from .spec import EvalSpec


class Answer(NamedTuple):
    kind: str
    depth: float
    found: bool
    found_after: bool | None  # with the question appended after eviction; None: nothing is evicted


def measure_recall(
    backend: Backend, spec: EvalSpec, prose: Prose, block: dict[str, Any] | None, advance: Callable
) -> tuple[tuple[list[Answer], list[float]], Memory, int]:
    """(answers, milliseconds of decode steps) of this rank; the cache after its first batch, and the tokens in it.

    The prompt is fed in chunks, then one token at a time; prompt and answer together are `context` tokens. When entries are evicted, at
    least the last token of the prompt is fed by itself, so that every token of an answer is read from what was kept: once with the rest
    of the question visible to the policy, once with the question appended, token by token, to a prompt that was evicted without it.
    """
    prompts = _prompts(spec, prose)
    if spec.requests == "distinct":
        prompts = prompts[backend.data_rank :: spec.data_ranks]
    answers, step_ms, memories = [], [], []
    evicts = block is not None and PiKVConfig.parse(block).scheduling.method != "none"
    for start in range(0, len(prompts), spec.batch):
        part = prompts[start : start + spec.batch]
        ids, question = [prompt.ids for _, prompt in part], max(prompt.question_tokens for _, prompt in part)
        texts: list[list[str]] = []
        for held_back in (1, question) if evicts else (0,):
            with backend.session(block, len(part), spec.context) as session:
                found, memory = _generate(session, ids, held_back, prose.answer_tokens(), spec.chunk, step_ms, backend.tokenizer)
            texts.append(found)
            memories.append(memory)
        for (kind, prompt), *said in zip(part, *texts, strict=True):
            found = [text.strip().startswith(prompt.answer) for text in said]
            answers.append(Answer(kind, prompt.depth, found[0], found[1] if evicts else None))
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
    session: Session, prompts: list[list[int]], held_back: int, new_tokens: int, chunk: int, step_ms: list[float], tokenizer: Any
) -> tuple[list[str], Memory]:
    """Continuations of the prompts, the last `held_back` tokens of which are fed one by one; the cache after them, counted from the last
    chunk of the prompt on, which holds the question."""
    ids, alone = torch.tensor(prompts).tensor_split([len(prompts[0]) - held_back], 1)
    for start in range(0, ids.shape[1], chunk):
        if start + chunk >= ids.shape[1]:
            before = session.memory()
            session.watch(True)
        logits = session.feed(ids[:, start : start + chunk])
    for column in alone.split(1, 1) if held_back else ():
        logits = session.feed(column)
    session.watch(False)
    chosen = [logits[:, -1].argmax(-1, keepdim=True).cpu()]
    while len(chosen) < new_tokens:
        started = time.perf_counter()
        chosen.append(session.feed(chosen[-1])[:, -1].argmax(-1, keepdim=True).cpu())  # reading the token ends the step on any device
        step_ms.append(1e3 * (time.perf_counter() - started))
    return [tokenizer.decode(row) for row in torch.cat(chosen, 1)], session.memory().counted_from(before)
