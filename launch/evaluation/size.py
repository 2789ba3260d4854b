"""Bytes of a cache that holds `context` tokens per request, without a measure of quality: for contexts that a model was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pikv_ds.bundled.recall import Prose

from .backend import Backend, Memory
from .ppl import windows_of
from .spec import EvalSpec, pieces

DECODED = 8  # last tokens, fed one by one: a policy that keeps the prompt evicts in decode steps


def measure_bytes(
    backend: Backend, spec: EvalSpec, prose: Prose, block: dict[str, Any] | None, advance: Callable
) -> tuple[None, Memory, int]:
    """The cache after its first batch, and the tokens in it; the other samples would take as many."""
    windows = windows_of(spec, prose, backend.data_rank)
    ids = windows[: spec.batch]
    with backend.session(block, len(ids), spec.context) as session:
        before = session.memory() if block is not None else None
        session.expect(ids.shape[1] - DECODED)
        for start, end in pieces(ids.shape[1] - DECODED, spec, ids.shape[1]):
            session.feed(ids[:, start:end], last=True)
        for column in ids[:, -DECODED:].split(1, 1):
            session.feed(column)
        memory = session.memory()
    advance(len(windows))
    return None, memory if before is None else memory.counted_from(before), ids.shape[0] * spec.context
