"""Prompts that hide facts in prose and ask for one of them. The sentences are those the bundled model was trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("passkey", "code")
_ATTRIBUTES = ("code", "number", "key", "password")
_ONSETS = ("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "dr", "gr", "kl", "st", "tr", "th")
_CODAS = ("", "", "n", "r", "l", "x", "m", "k", "s", "t", "nd", "rn")


class RecallPrompt(NamedTuple):
    """ids: exactly as many tokens as asked for, a beginning-of-text token included; answer: how the decoded continuation, stripped,
    starts; depth: where the asked fact begins, as a fraction of the prompt; question_tokens: of ids, at the end."""

    ids: list[int]
    answer: str
    depth: float
    question_tokens: int


class Prose:
    """A text as tokens, with the places where a sentence may begin; shared by all prompts cut from it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.tokenizer = tokenizer
        self.prefix: list[int] = tokenizer("")["input_ids"]  # what the tokenizer puts before a text: a beginning-of-text token, or nothing
        self.ids = self.encode(text)
        self.sentence_ends = sentence_ends(tokenizer, self.ids)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def answer_tokens(self) -> int:
        """Tokens of an answer as the model writes it."""
        return len(self.encode(" 12345"))


def recall_prompt(prose: Prose, length: int, *, kind: str, depth: float, seed: int) -> RecallPrompt:
    """A prompt of exactly `length` tokens: `passkey` hides one fact, `code` one key and its value per 64 tokens (2 to 24) and asks for one.

    Args:
        depth: where the asked fact stands, 0 = at the beginning, 1 = right before the question (rounded to a sentence end).
        seed: chooses the facts, their places and where the prose begins.

    Raises: ValueError for an unknown kind, or a length that the facts or the prose do not fill.
    """
    rng = random.Random(f"{kind} {seed}")
    facts, question, answer = _facts(rng, kind, length)
    facts, question = [prose.encode(fact) for fact in facts], prose.encode(question)
    taken = len(prose.prefix) + len(question) + sum(map(len, facts))
    room = length - taken
    if not 0 < room < len(prose.ids):
        raise ValueError(f"length = {length}: legal for kind {kind!r} with this text is {taken + 1} to {taken + len(prose.ids) - 1} tokens")
    start = rng.randrange(len(prose.ids) - room)
    gaps = [0, *(end - start for end in prose.sentence_ends if start < end < start + room), room]
    asked_at = min(gaps, key=lambda gap: abs(gap - depth * room))
    places = [asked_at, *(rng.choice(gaps) for _ in facts[1:])]
    ids, done, asked_from = list(prose.prefix), 0, 0
    for place, idx in sorted((place, idx) for idx, place in enumerate(places)):
        ids += prose.ids[start + done : start + place]
        done = place
        if idx == 0:
            asked_from = len(ids)
        ids += facts[idx]
    ids += prose.ids[start + done : start + room] + question
    return RecallPrompt(ids, answer, asked_from / length, len(question))


def _facts(rng: random.Random, kind: str, length: int) -> tuple[list[str], str, str]:
    """Sentences (the asked one first), the question, the answer."""
    if kind == "passkey":
        value = _digits(rng)
        return [f" The pass key is {value}. Remember it. {value} is the pass key."], " What is the pass key? The pass key is", value
    if kind != "code":
        raise ValueError(f"kind = {kind!r}: legal are {', '.join(map(repr, KINDS))}")
    attribute, names = rng.choice(_ATTRIBUTES), {}
    names_drawn = _names(rng)
    while len(names) < max(2, min(24, length // 64)):
        names.setdefault(next(names_drawn), _digits(rng))
    asked = next(iter(names))
    return (
        [f" The {attribute} for {name} is {value}." for name, value in names.items()],
        f" What is the {attribute} for {asked}?",
        names[asked],
    )


def _names(rng: random.Random) -> Iterator[str]:
    while True:
        yield "".join(rng.choice(_ONSETS) + rng.choice("aeiou") + rng.choice(_CODAS) for _ in range(2)).capitalize()


def _digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(5))


def sentence_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Indices after each token that closes a sentence."""
    texts = {token: tokenizer.decode([token]) for token in set(ids)}
    closing = {token for token, text in texts.items() if text.strip(" ") in (".", "?", "!") or text.endswith("\n")}
    return [idx + 1 for idx, token in enumerate(ids) if token in closing]
