"""Logits -> tokens and their log-probabilities. V vocabulary."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from .messages import Logprob, Sampling


class Sampler:
    """Of one request: its random numbers and what it has said so far."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling, self.device = sampling, device
        self.said: Counter[int] = Counter()
        self._generator: torch.Generator | None = None

    @property
    def plain(self) -> bool:
        """The most likely token, and nothing besides."""
        s = self.sampling
        return s.temperature == 0 and s.logprobs is None and not (s.bias or s.presence_penalty or s.frequency_penalty)

    def choose(self, logits: Tensor) -> tuple[int, Logprob | None]:
        """Of logits [V] f32. Log-probabilities are the model's own, before temperature and cuts. Sync: reads the device."""
        token = int(self._draw(self._changed(logits)))
        self.said[token] += 1
        return token, None if self.sampling.logprobs is None else logprob_of(logits.log_softmax(-1), token, self.sampling.logprobs)

    def _changed(self, logits: Tensor) -> Tensor:
        s = self.sampling
        if not (s.bias or s.presence_penalty or s.frequency_penalty):
            return logits
        logits = logits.clone()
        for token, bias in s.bias.items():
            logits[token] += bias
        for token, count in self.said.items():
            logits[token] -= s.presence_penalty + s.frequency_penalty * count
        return logits

    def _draw(self, logits: Tensor) -> Tensor:
        s = self.sampling
        if s.temperature == 0:
            return logits.argmax()
        if self._generator is None:
            self._generator = torch.Generator(self.device).manual_seed(s.seed)
        values, tokens = (logits / s.temperature).sort(descending=True)
        probabilities = values.softmax(-1)
        if s.top_k:
            probabilities[s.top_k :] = 0
        if s.top_p < 1:  # the fewest that hold top_p; the first stays in any case
            probabilities[1:][probabilities.cumsum(-1)[:-1] >= s.top_p] = 0
        return tokens[torch.multinomial(probabilities, 1, generator=self._generator)]


def logprob_of(logprobs: Tensor, token: int, count: int) -> Logprob:
    """Of one token among logprobs [V]. Sync: reads the device."""
    if not count:
        return Logprob(token, float(logprobs[token]), [])
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    return Logprob(token, float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def of_prompt(logits: Tensor, tokens: list[int], count: int) -> list[Logprob]:
    """Of prompt tokens, each by the logits [n, V] of the token before it. Sync: reads the device."""
    if not tokens:
        return []
    logprobs = logits[: len(tokens)].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1))[:, 0].tolist()
    top = logprobs.topk(max(1, count))
    listed = [list(zip(*row, strict=True))[:count] for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return [Logprob(*each) for each in zip(tokens, own, listed, strict=True)]
