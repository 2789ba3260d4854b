"""A request as rank 0 follows it, from its arrival to its last token."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from .messages import Logprob, Sampling
from .text import TextOut

_numbers = itertools.count(1)


class Update(NamedTuple):
    """What a client can be told after a step. finish: "stop" or "length" with the last one; error: the request has failed."""

    text: str
    tokens: list[int]
    logprobs: list[Logprob]
    prompt_logprobs: list[Logprob]
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """Times are of time.monotonic(), in seconds. tell: called in the engine's thread, must not block."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    out: TextOut
    tell: Callable[[Update], None]
    arrived: float
    eos: frozenset[int]
    number: int = field(default_factory=lambda: next(_numbers))
    rank: int | None = None
    """None: it waits."""
    stored: int = 0
    """Of its tokens, in the cache."""
    reused: int = 0
    """Of its prompt, taken over from another request."""
    tokens: list[int] = field(default_factory=list)
    last_token: float | None = None
    cancelled: bool = False
    finished: str | None = None

    @property
    def waits_for_prompt(self) -> int:
        """Tokens of its prompt that are still to be run."""
        return max(len(self.prompt) - self.stored, 0)

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.max_tokens

    def push(self, token: int, logprob: Logprob | None) -> Update:
        """One more token has come."""
        self.tokens.append(token)
        if token in self.eos:
            self.finished = "stop"
        else:
            self.out.push(token)
            self.finished = "stop" if self.out.stopped else "length" if len(self.tokens) >= self.max_tokens else None
        if self.finished:
            self.out.finish()
        shown = [] if logprob is None else [logprob]
        return Update(self.out.take(last=self.finished is not None), [token], shown, [], self.finished)
