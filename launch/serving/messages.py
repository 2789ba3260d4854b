"""What rank 0 tells the ranks before a step, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens of a request are chosen. temperature 0: the most likely one.

    logprobs: how many of the most likely tokens are told beside the chosen one's; None = no log-probabilities. Of prompt tokens as well
    where `echo`. bias: token id -> what its logit gains.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: int | None = None
    echo: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)


class NewRequest(NamedTuple):
    """A request that begins on `rank`, counted without tensor-parallel peers.

    It takes over the first `keep` tokens of request `source`, which the cache holds; -1: of none.
    """

    number: int
    rank: int
    prompt: list[int]
    sampling: Sampling
    source: int = -1
    keep: int = 0


@dataclass(slots=True)
class Plan:
    """One step, the same message to all ranks. pieces: (request, how many of its tokens run now)."""

    new: list[NewRequest] = field(default_factory=list)
    pieces: list[tuple[int, int]] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)
    """Requests whose entries go."""
    forward: bool = False
    """All ranks run a forward, those without pieces an idle one."""
    stats: bool = False
    stop: bool = False


class Logprob(NamedTuple):
    """Of one token; top: (token, its log-probability) of the most likely ones."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class NewToken(NamedTuple):
    number: int
    token: int
    logprob: Logprob | None


@dataclass(slots=True)
class Answer:
    """What a rank has to say after a step."""

    tokens: list[NewToken] = field(default_factory=list)
    prompts: list[tuple[int, list[Logprob]]] = field(default_factory=list)
    """Log-probabilities of further prompt tokens, in order."""
    stats: dict[str, Any] | None = None
