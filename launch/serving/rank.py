"""One rank's share of a service: its requests' tokens, the forward of a step, the tokens that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .messages import Answer, NewRequest, NewToken, Plan, Sampling
from .runner import Piece, Runner
from .sampling import Sampler, of_prompt


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]
    prompt: int
    sampler: Sampler
    stored: int
    source: int
    """Of which the first `stored` tokens are taken over in its first forward."""

    @property
    def sampling(self) -> Sampling:
        return self.sampler.sampling


class Rank:
    """Does what plans say. All ranks get the same plans; each keeps the requests that are its own."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._sequences: dict[int, _Sequence] = {}

    def run(self, plan: Plan) -> Answer:
        """Sync: reads the chosen tokens back."""
        answer = Answer()
        for new in plan.new:
            if new.rank == self.runner.data_rank:
                self._begin(new)
        if plan.forward:
            self._forward(plan, answer)
        if plan.stats:
            answer.stats = self.runner.stats()
        return answer if self.runner.speaks else Answer(stats=answer.stats)

    def _begin(self, new: NewRequest) -> None:
        sampler = Sampler(new.sampling, self.runner.device)
        self._sequences[new.number] = _Sequence(list(new.prompt), len(new.prompt), sampler, new.keep, new.source)

    def _forward(self, plan: Plan, answer: Answer) -> None:
        drop = [number for number in plan.drop if number in self._sequences]
        pieces = [self._piece(number, count) for number, count in plan.pieces if number in self._sequences]
        logits = self.runner.step(pieces, drop)
        for number in drop:
            del self._sequences[number]
        greedy: list[int] = []
        for piece in pieces:
            sequence = self._sequences[piece.number]
            if sequence.sampling.echo and sequence.sampling.logprobs is not None and piece.start < sequence.prompt:
                told = sequence.tokens[piece.start + 1 : min(piece.start + len(piece.tokens) + 1, sequence.prompt)]
                answer.prompts.append((piece.number, of_prompt(logits[piece.number], told, sequence.sampling.logprobs)))
            if sequence.stored < len(sequence.tokens):
                continue  # what follows a chunk of a prompt is known
            if sequence.sampler.plain:
                greedy.append(piece.number)
                continue
            token, logprob = sequence.sampler.choose(logits[piece.number][-1])
            answer.tokens.append(NewToken(piece.number, token, logprob))
        if greedy:
            best = torch.stack([logits[number][-1] for number in greedy]).argmax(-1).tolist()
            answer.tokens += [NewToken(number, token, None) for number, token in zip(greedy, best, strict=True)]
        for new in answer.tokens:
            self._sequences[new.number].tokens.append(new.token)

    def _piece(self, number: int, count: int) -> Piece:
        sequence = self._sequences[number]
        start, source = sequence.stored, sequence.source
        sequence.stored, sequence.source = start + count, -1
        wants_all = sequence.sampling.echo and sequence.sampling.logprobs is not None and start < sequence.prompt
        return Piece(number, sequence.tokens[start : start + count], start, source, wants_all, sequence.prompt)
