"""Few-shot prompts that begin alike (storage.prefix), scored by lm-eval: one cache for all calls, in which only what is new is run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .hf import HFBackend, PiKVSession
from .scoring import Continuations


def shares_prefixes(block: dict[str, Any] | None) -> bool:
    return block is not None and bool(block["storage"]["prefix"]["enabled"])


class PrefixRun:
    """Owns the attachment from the first call on, until close(). Collective throughout, as the backend's sessions."""

    def __init__(self, backend: HFBackend, block: dict[str, Any]) -> None:
        self.backend, self.block = backend, block
        self._open = contextlib.ExitStack()
        self._session: PiKVSession | None = None

    @property
    def session(self) -> PiKVSession:
        if self._session is None:
            self._session = self._open.enter_context(self.backend.session(self.block, 0, 0))
        return self._session

    def score(self, rows: Tensor, asked: Continuations, chunk: int) -> Tensor:
        """rows [B, T] int64, padded on the right -> logits [B, T, V] f32; NaN in columns that were not run and whose logits nobody reads.

        Attention to what is not in the same forward reads the store, as without prefixes: forwards begin where these would.
        """
        session = self.session
        session.cache.begin_generation()
        held = session.cache.reuse(rows[:, : asked.first_scored(rows) + 1].to(self.backend.model.device))
        widths, done = [], 0
        for width in asked.forwards(rows, chunk):
            widths += [min(width, done + width - held)] if done + width > held else []
            done += width
        logits = torch.cat([session.feed(part) for part in rows[:, held:].split(widths, 1)], 1)
        return torch.nn.functional.pad(logits, (0, 0, held, 0), value=torch.nan)

    @contextlib.contextmanager
    def generation(self) -> Iterator[dict[str, Any]]:
        """Inside, generate() takes the cache by itself, and finds what its prompts begin with."""
        assert self.session is not None, "it is attached"
        yield {}

    def close(self) -> None:
        self._session = None
        self._open.close()
