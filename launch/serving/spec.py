"""What a service runs, as plain data that its ranks receive."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pikv_ds.launch.evaluation.spec import EvalSpec

BACKENDS = ("hf", "megatron")
SCHEDULES = ("deadline", "fcfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSpec:
    """model: a transformers folder. block: the "pikv" block. Lengths in tokens, times in milliseconds.

    max_running: requests with entries in the cache, per rank. prefix_rows: finished requests per rank whose entries stay, for prompts that
    begin alike. kv_tokens: tokens that running requests may come to hold per rank, together with what finished ones still hold; None = no
    limit but max_running and prefix_rows.
    """

    backend: str
    model: str
    load: str | None
    name: str
    block: dict[str, Any]
    dtype: str
    ranks: int
    tp: int
    ep: int
    threads: int
    max_length: int
    max_running: int
    max_waiting: int
    kv_tokens: int | None
    prefix_rows: int
    max_chunk: int
    schedule: str
    ttft_ms: float
    tbt_ms: float
    timeout_s: float
    chat_template: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServeSpec:
        return cls(**json.loads(text))

    def for_backend(self) -> EvalSpec:
        """What loads a model here also loads it for `pikv eval`; what only an evaluation needs is of no effect."""
        return EvalSpec(
            backend=self.backend, model=self.model, load=self.load, text=None, context=self.max_length, chunk=1, samples=1, batch=1, seed=0,
            dtype=self.dtype, requests="distinct", ranks=self.ranks, tp=self.tp, ep=self.ep,
        )  # fmt: skip
