"""Windows of tokens to train on and to hold out: a text, and prompts that hide facts in it and ask for one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

from pikv_ds.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT_SHARE = 8  # one window in so many


class Tokens(NamedTuple):
    """ids [N, T] int64 and which of them ask or answer, [N, T] bool."""

    ids: Tensor
    question: Tensor


def windows_of(tokenizer: Any, text: str, context: int, samples: int | None, facts: int, seed: int) -> tuple[Tokens, Tokens]:
    """To train on, and held out: windows of the text without overlap, the last eighth held out, and `facts` prompts, an eighth likewise.

    Prompts are made of the text that their side has, so nothing of what is held out is trained on; their facts are drawn for each.
    Raises: TrainingError for a text that is too short, ConfigError for numbers that can't be.
    """
    if context < 16:
        raise ConfigError(f"--context {context}: legal is 16 or more tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = len(ids) // context
    if found < 2:
        raise TrainingError(
            f"the text has {len(ids):,} tokens, and --context {context} needs two windows of it: one to train on, one held out"
        )
    apart = max(1, found // HELD_OUT_SHARE)
    last, taken = found - apart, samples or found
    train, held = range(min(taken, last)), range(last, last + max(1, min(apart, -(-taken // HELD_OUT_SHARE))))
    rows = lambda at: [ids[i * context : (i + 1) * context] for i in at]  # noqa: E731
    middle = tokenizer.decode(ids[: last * context]), tokenizer.decode(ids[last * context :])
    fact_counts = facts - facts // HELD_OUT_SHARE, facts // HELD_OUT_SHARE
    sides = zip((train, held), middle, fact_counts, (seed, seed + 1), strict=True)
    return tuple(_tokens(rows(at), prompts(tokenizer, prose, context, count, own)) for at, prose, count, own in sides)


def repeated(tokens: Tokens) -> Tokens:
    """[N, 2 T - 1]: every window and again what follows its first token, which alone is the question: a rehearsal as the model reads it."""
    import torch

    ids = torch.cat([tokens.ids, tokens.ids[:, 1:]], 1)
    return Tokens(ids, (torch.arange(ids.shape[1]) >= tokens.ids.shape[1]).expand_as(ids).contiguous())


def prompts(tokenizer: Any, text: str, context: int, count: int, seed: int) -> list[tuple[list[int], int]]:
    """`count` prompts of `context` tokens with their answers: ids, and how many of them, at the end, ask and answer."""
    from pikv_ds.bundled.recall import KINDS, Prose, recall_prompt

    if not count:
        return []
    prose, rng, found = Prose(tokenizer, text), random.Random(f"facts {seed}"), []
    for i in range(count):
        room = prose.answer_tokens()
        prompt = recall_prompt(prose, context - room, kind=KINDS[i % len(KINDS)], depth=rng.random(), seed=rng.getrandbits(40))
        answer = prose.encode(f" {prompt.answer}")[:room]
        ids = [*prompt.ids, *answer]
        ids += [ids[0]] * (context - len(ids))
        found.append((ids, prompt.question_tokens + room))
    return found


def _tokens(rows: list[list[int]], asked: list[tuple[list[int], int]]) -> Tokens:
    import torch

    ids = torch.tensor([*rows, *(prompt for prompt, _ in asked)])
    question = torch.zeros_like(ids, dtype=torch.bool)
    for i, (_, count) in enumerate(asked, len(rows)):
        question[i, -count:] = True
    return Tokens(ids, question)
