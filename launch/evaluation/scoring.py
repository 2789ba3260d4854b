"""Log-likelihoods and greedy texts of token sequences through the store: what an evaluation harness asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pikv_ds.errors import UnsupportedError

from .backend import Backend, Session

Ids = list[int]


class Scorer:
    """Sequences of equal shape share a forward. The context is fed in chunks, so that what follows it reads it from the store.

    Args: block: the "pikv" block, None = the host's dense cache. chunk: tokens per forward. batch: sequences in the cache at a time.
        max_length: tokens of a sequence; longer contexts lose their beginning.
    """

    def __init__(self, backend: Backend, block: dict[str, Any] | None, *, chunk: int, batch: int, max_length: int) -> None:
        self.backend, self.block, self.chunk, self.batch, self.max_length = backend, block, chunk, batch, max_length

    @torch.no_grad()
    def loglikelihoods(self, pairs: Sequence[tuple[Ids, Ids]], advance: Callable[[int], None]) -> list[tuple[float, bool]]:
        """Per (context, continuation), neither empty: natural log-likelihood of the continuation, and whether greedy decoding gives it."""
        results: list = [None] * len(pairs)
        for (context_length, length), rows in self._batches([(len(context), len(continuation)) for context, continuation in pairs]):
            kept = min(context_length, self.max_length + 1 - length)
            if kept < 1:
                raise UnsupportedError(
                    f"a continuation of {length} tokens leaves no room for a context in {self.max_length} tokens (max_length)"
                )
            ids = torch.tensor([pairs[row][0][-kept:] + pairs[row][1] for row in rows])
            with self.backend.session(self.block, len(rows), self.max_length) as session:
                # Logits of the last context token predict the continuation's first.
                logits = [self._feed(session, ids[:, :kept])[:, -1:]]
                if length > 1:
                    logits.append(self._feed(session, ids[:, kept:-1]))
            log_probs, targets = torch.cat(logits, 1).log_softmax(-1).cpu(), ids[:, kept:]
            scores = log_probs.gather(-1, targets.unsqueeze(-1)).sum((1, 2), dtype=torch.float64).tolist()
            greedy = (log_probs.argmax(-1) == targets).all(1).tolist()
            for row, *result in zip(rows, scores, greedy, strict=True):
                results[row] = tuple(result)
            advance(len(rows))
        return results

    @torch.no_grad()
    def generate(self, prompts: Sequence[tuple[Ids, int, tuple[str, ...]]], advance: Callable[[int], None]) -> list[str]:
        """Per (prompt, most new tokens, stop strings): the greedy continuation up to the first stop string, which is left out."""
        results: list = [None] * len(prompts)
        for (_, new_tokens), rows in self._batches([(len(prompt), most) for prompt, most, _ in prompts]):
            if new_tokens >= self.max_length:
                raise UnsupportedError(f"{new_tokens} new tokens leave no room for a prompt in {self.max_length} tokens (max_length)")
            ids = torch.tensor([prompts[row][0] for row in rows])[:, -(self.max_length - new_tokens) :]
            with self.backend.session(self.block, len(rows), self.max_length) as session:
                texts = self._greedy(session, ids, new_tokens, [prompts[row][2] for row in rows])
            for row, text in zip(rows, texts, strict=True):
                results[row] = text
            advance(len(rows))
        return results

    def _greedy(self, session: Session, ids: torch.Tensor, new_tokens: int, stops: list[tuple[str, ...]]) -> list[str]:
        token = self._feed(session, ids)[:, -1].argmax(-1, keepdim=True).cpu()
        chosen = [token]
        while True:
            texts = [self.backend.tokenizer.decode(row) for row in torch.cat(chosen, 1)]
            if len(chosen) == new_tokens or all(_cut(text, stop) != text for text, stop in zip(texts, stops, strict=True)):
                return [_cut(text, stop) for text, stop in zip(texts, stops, strict=True)]
            chosen.append(session.feed(chosen[-1])[:, -1].argmax(-1, keepdim=True).cpu())

    def _feed(self, session: Session, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([session.feed(part) for part in ids.split(self.chunk, 1)], 1)

    def _batches(self, shapes: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """(shape, indices of at most `batch` sequences that have it), longest first: what does not fit in memory fails at once."""
        for shape in sorted(set(shapes), reverse=True):
            rows = [row for row, found in enumerate(shapes) if found == shape]
            for start in range(0, len(rows), self.batch):
                yield shape, rows[start : start + self.batch]


def _cut(text: str, stops: tuple[str, ...]) -> str:
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
