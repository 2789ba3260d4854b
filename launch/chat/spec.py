"""What a chat runs, as plain data that its ranks receive."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pikv_ds.launch.evaluation.spec import EvalSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSpec:
    """model: a transformers folder. block: the "pikv" block. Lengths in tokens. chunk: of a forward over what was said. temperature:
    0 = the likeliest token."""

    model: str
    block: dict[str, Any]
    dtype: str
    ranks: int
    ep: int
    threads: int
    max_length: int
    new_tokens: int
    chunk: int
    temperature: float
    seed: int
    timeout_s: float
    session: str | None = None
    """A file: the conversation goes on from there, if it is there, and is saved to it at the end."""
    backend: str = "hf"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ChatSpec:
        return cls(**json.loads(text))

    def for_backend(self) -> EvalSpec:
        return EvalSpec(
            backend=self.backend, model=self.model, load=None, text=None, context=self.max_length, chunk=1, samples=1, batch=1,
            seed=self.seed, dtype=self.dtype, requests="replicated", ranks=self.ranks, tp=1, ep=self.ep,
        )  # fmt: skip
