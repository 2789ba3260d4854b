"""What a run evaluates, as plain data that the ranks receive; the columns of its rows; which chunks measure the store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pikv_ds.errors import ConfigError
from pikv_ds.spec import LayerSpec

RULER = ("passkey", "retrieval", "multikey", "tracking", "words")
TASKS = ("ppl", "recall", "bytes", "agreement", *RULER)
DEFAULT_TASKS = ("ppl", "recall")
BACKENDS = ("hf", "megatron")
COLUMNS = (
    "backend", "config", "method", "task", "ranks", "tp", "ep", "context", "chunk", "seed", "dtype", "ppl", "ppl_change_pct", "kl",
    "recall", "mass_recall", "bytes_per_token", "compression", "entries_read", "kv_bytes_per_rank", "step_ms", "attention_impl",
)  # fmt: skip
LEAST_STORE_SHARE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSpec:
    """Everything but the units.

    `model` is a transformers folder; `load` a Megatron dist checkpoint whose weights replace the folder's, or None. With `tokenizer`, a
    path, there is no such folder: the model is what the checkpoint's arguments say, and `model` is `load`.

    chunk: tokens of a forward, those before the measured part of a sample in forwards of prefill_chunk, None = of chunk as well.
    scored: tokens of a window of task ppl that are scored, its last ones, None = half of it. template: prompts of RULER tasks are written
    as a chat; None: where the tokenizer has a template.
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
    prefill_chunk: int | None = None
    scored: int | None = None
    template: bool | None = None

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of tensor-parallel peers, that can each run requests of their own."""
        return self.ranks // self.tp

    def to_json(self, units: Iterable[Unit]) -> str:
        return json.dumps({"spec": asdict(self), "units": [asdict(unit) for unit in units]})


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One task under one configuration: a "pikv" block, or None for the host's dense cache; or under another cache than ours, by name."""

    task: str
    block: dict[str, Any] | None
    other: str | None = None


def from_json(text: str) -> tuple[EvalSpec, list[Unit]]:
    document = json.loads(text)
    return EvalSpec(**document["spec"]), [Unit(**unit) for unit in document["units"]]


def scored_queries(context: int, scored: int | None = None) -> range:
    """Positions whose next token is scored: those that predict the last `scored` tokens of the window, None = its last half."""
    return range(context - (scored or context // 2) - 1, context - 1)


def pieces(length: int, spec: EvalSpec, measured_from: int) -> list[tuple[int, int]]:
    """The forwards (start, end) over `length` tokens: long ones, then chunks from the last multiple of spec.chunk at or before
    `measured_from` on."""
    head = min(measured_from, length) // spec.chunk * spec.chunk
    cuts = [*range(0, head, spec.prefill_chunk or spec.chunk), *range(head, length, spec.chunk), length]
    return list(zip(cuts, cuts[1:], strict=False))


def store_share(layers: list[LayerSpec], context: int, chunk: int, scored: int | None = None) -> float:
    """Share of the entries that scored queries attend to which lie in the store: all but those of the query's own chunk."""
    attended = own = 0
    for spec in layers:
        window = spec.window or context
        for query in scored_queries(context, scored):
            attended += min(query + 1, window)
            own += min(query % chunk + 1, window)
    return 1 - own / attended


def fit_chunk(layers: list[LayerSpec], context: int, chunk: int | None, scored: int | None = None) -> int:
    """The chunk asked for, or the longest of up to 32. Raises ConfigError when less than 95 % of what is read would come from the store."""
    if chunk is not None and chunk < 1:
        raise ConfigError(f"--chunk {chunk}: legal is 1 or more; attention inside a chunk does not pass through the store")
    for size in [chunk] if chunk else [32, 16, 8, 4, 2, 1]:
        share = store_share(layers, context, size, scored)
        if share >= LEAST_STORE_SHARE:
            return size
    raise ConfigError(
        f"--context {context} in chunks of {size}: {share:.1%} of the entries that scored queries read come from the store, at least "
        f"{LEAST_STORE_SHARE:.0%} must; use a shorter --chunk or a longer --context"
    )
