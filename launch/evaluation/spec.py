"""What a run evaluates, as plain data that the ranks receive; the columns of its rows; which chunks measure the store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pikv_ds.errors import ConfigError
from pikv_ds.spec import LayerSpec

TASKS = ("ppl", "recall", "bytes")
DEFAULT_TASKS = ("ppl", "recall")
BACKENDS = ("hf", "megatron")
COLUMNS = (
    "backend", "config", "method", "task", "ranks", "tp", "ep", "context", "chunk", "seed", "dtype", "ppl", "ppl_change_pct", "kl",
    "recall", "mass_recall", "bytes_per_token", "compression", "entries_read", "kv_bytes_per_rank", "step_ms", "attention_impl",
)  # fmt: skip
LONGEST_CHUNK = 32
LEAST_STORE_SHARE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSpec:
    """Everything but the units.

    `model` is a transformers folder; `load` a Megatron dist checkpoint whose weights replace the folder's, or None. With `tokenizer`, a
    path, there is no such folder: the model is what the checkpoint's arguments say, and `model` is `load`.
    """

    backend: str
    model: str
    load: str | None
    text: str | None
    context: int
    chunk: int
    samples: int
    batch: int
    seed: int
    dtype: str
    requests: str
    ranks: int
    tp: int
    ep: int
    tokenizer: str | None = None

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of tensor-parallel peers, that can each run requests of their own."""
        return self.ranks // self.tp

    def to_json(self, units: Iterable[Unit]) -> str:
        return json.dumps({"spec": asdict(self), "units": [asdict(unit) for unit in units]})


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One task under one configuration: a "pikv" block, or None for the host's dense cache."""

    task: str
    block: dict[str, Any] | None


def from_json(text: str) -> tuple[EvalSpec, list[Unit]]:
    document = json.loads(text)
    return EvalSpec(**document["spec"]), [Unit(**unit) for unit in document["units"]]


def scored_queries(context: int) -> range:
    """Positions whose next token is scored: those that predict the last half of the window."""
    return range(context - context // 2 - 1, context - 1)


def store_share(layers: list[LayerSpec], context: int, chunk: int) -> float:
    """Share of the entries that scored queries attend to which lie in the store: all but those of the query's own chunk."""
    attended = own = 0
    for spec in layers:
        window = spec.window or context
        for query in scored_queries(context):
            attended += min(query + 1, window)
            own += min(query % chunk + 1, window)
    return 1 - own / attended


def fit_chunk(layers: list[LayerSpec], context: int, chunk: int | None) -> int:
    """The chunk asked for, or the longest legal one. Raises ConfigError when less than 95 % of what is read would come from the store."""
    if chunk is not None and not 1 <= chunk <= LONGEST_CHUNK:
        raise ConfigError(f"--chunk {chunk}: legal is 1 to {LONGEST_CHUNK}; attention inside a chunk does not pass through the store")
    for size in [chunk] if chunk else [32, 16, 8, 4, 2, 1]:
        share = store_share(layers, context, size)
        if share >= LEAST_STORE_SHARE:
            return size
    raise ConfigError(
        f"--context {context} in chunks of {size}: {share:.1%} of the entries that scored queries read come from the store, at least "
        f"{LEAST_STORE_SHARE:.0%} must; use a shorter --chunk or a longer --context"
    )
