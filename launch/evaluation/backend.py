"""What a task sees of a host. B rows, T new tokens, V vocabulary."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pikv_ds.config.pikv import PiKVConfig

if TYPE_CHECKING:
    from torch import Tensor

    from pikv_ds.cache.cache import PiKVCache
    from pikv_ds.spec import LayerSpec


class Memory(NamedTuple):
    """This rank's KV cache as it stands: bytes of its storages, bytes an ordinary cache would take, what reads it.

    read, visible: entries that queries read from the store so far, and those that they could have read; 0 when nothing is counted.
    mass, queries: share of the attention to visible entries that lies on those read, summed over queries while watched, and how many.
    fullest_shard: entries of a layer's fullest shard / mean over its shards, mean over layers; None with one shard.
    misses: of the KV router, mean over layers and shards; None when it counts none.
    """

    allocated: int
    dense: int
    attention_impl: str
    read: float = 0.0
    visible: float = 0.0
    mass: float = 0.0
    queries: float = 0.0
    fullest_shard: float | None = None
    misses: float | None = None

    def counted_from(self, before: Memory) -> Memory:
        return self._replace(**{name: getattr(self, name) - getattr(before, name) for name in COUNTS})


COUNTS = ("read", "visible", "mass", "queries")


class Session(Protocol):
    """One batch of requests in one cache, empty at first. All ranks make the same calls."""

    def feed(self, ids: Tensor, *, last: bool = False) -> Tensor:
        """Append ids [B, T] int64 to the requests; logits [B, T, V] f32 of these tokens, with `last` [B, 1, V] of the last ones."""

    def expect(self, tokens: int) -> None:
        """The first `tokens` of each request are its prompt: scheduling.prefill "auto" evicts nothing before they are there."""

    whole: bool
    """A prompt must come in one forward."""

    def memory(self) -> Memory: ...

    def watch(self, on: bool) -> None:
        """From now on (not) also measure which share of the attention the entries read hold: costs another read of everything."""


class Backend(Protocol):
    """A loaded model. layers: geometry of the whole model. data_rank: which of spec.data_ranks this rank belongs to."""

    name: str
    model: Any
    tokenizer: Any
    layers: list[LayerSpec]
    data_rank: int

    def session(self, block: dict[str, Any] | None, rows: int, length: int) -> AbstractContextManager[Session]:
        """Requests of at most `length` tokens in the cache that the "pikv" block configures; None = the host's dense cache."""

    def evicts(self, block: dict[str, Any] | None) -> bool:
        """Whether a session of it leaves entries out."""

    @property
    def causal_lm(self) -> Any:
        """The model as transformers sees one: config, generation_config, device, dtype, generate()."""

    def generation(self, block: dict[str, Any] | None, attention_mask: Tensor, length: int) -> AbstractContextManager[dict[str, Any]]:
        """Inside, causal_lm.generate() with the keywords that this gives fills a cache like session()'s, empty at first.

        attention_mask [B, T]: of the prompts, padded on the left; length: of the longest row with what is generated.
        """

    def close(self) -> None: ...


def block_evicts(block: dict[str, Any] | None) -> bool:
    return block is not None and PiKVConfig.parse(block).scheduling.method != "none"


def first_of(memories: list[Memory]) -> Memory:
    """Sizes of the first, counts of all."""
    return memories[0]._replace(**{name: sum(getattr(memory, name) for memory in memories) for name in COUNTS})


def counts_of(core: PiKVCache) -> tuple[float | None, ...]:
    """COUNTS of a cache, zeros when it reads everything; then fullest_shard and misses."""
    from pikv_ds.cache.inspect import CacheProbe

    probe = CacheProbe(core)
    return *(probe.read or (0.0,) * len(COUNTS)), _fullest_shard(core.num_shards, probe.loads.float()), _mean_of(probe.misses)


def _fullest_shard(num_shards: int, loads: Tensor) -> float | None:
    """loads: [L, S] f32 entries."""
    return None if num_shards == 1 else float((loads.amax(1) / loads.mean(1).clamp_min(1)).mean())


def _mean_of(misses: list[Tensor | None]) -> float | None:
    counted = [float(shards.mean()) for shards in misses if shards is not None]
    return sum(counted) / len(counted) if counted else None


def watch(core: PiKVCache, on: bool) -> None:
    from pikv_ds.cache.inspect import CacheProbe

    CacheProbe(core).measure_mass(on)
