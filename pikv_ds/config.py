"""The "pikv" configuration block: every key, its range, and the checks that involve more than one key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pikv_ds.config_checks import (
    check_budget,
    check_companion,
    check_exchange,
    check_experts,
    check_host_penalty,
    check_method,
    check_pools,
    check_ready,
    check_retention,
    check_table,
)
from pikv_ds.config_errors import describe, problem
from pikv_ds.errors import ConfigError
from pikv_ds.presets import PRESETS, expand

if TYPE_CHECKING:
    from pikv_ds.codecs.base import Codec
    from pikv_ds.host_penalty import RouterPenalty
    from pikv_ds.policies.base import RetentionPolicy
    from pikv_ds.routers.base import Router


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


Table = Annotated[tuple[tuple[tuple[int, ...], ...], ...], BeforeValidator(_as_tuples)]


class _Block(BaseModel):
    # strict: "32" is not a number and true is not 1; a typo in JSON must not be guessed at.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class StorageConfig(_Block):
    """Where each entry is stored."""

    requests: Literal["auto", "replicated", "distinct"] = Field(
        "auto", description="Whether the ranks run the same requests; auto compares a digest of them at prefill."
    )
    num_shards: int | None = Field(None, ge=1, description="Logical shards per layer; null = number of EP ranks.")
    placement: Literal["experts", "xor", "position", "table"] = Field(
        "experts",
        description="How an entry finds its shard: its expert, (t mod n_tok) XOR expert, its position, or `table`.",
    )
    expert_ids: Literal["previous_layer", "lookahead", "true", "gate", "hash"] = Field(
        "previous_layer", description="Which router names the expert of an entry."
    )
    n_tok: int = Field(1, ge=1, description="Token modulus of the xor placement; a power of two.")
    table: Table | None = Field(
        None,
        description="Shard ids [num_layers or 1][num_experts][max_replicas], -1 = none; for placement table only.",
    )
    gate_path: str | None = Field(None, min_length=1, description="safetensors file of a learned KV gate; for expert_ids gate only.")
    capacity_tokens: int | None = Field(
        None, ge=1, description="Entries per layer and shard; null = ceil(1.1 x the balanced share) + one page."
    )
    overflow: Literal["spill", "error"] = Field(
        "spill", description="What happens when a shard is full: use the least loaded one, or stop."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n_tok & (self.n_tok - 1):
            raise problem("storage.n_tok", self.n_tok, "a power of two (1, 2, 4, ...): the XOR must stay in range")
        if self.n_tok != 1 and self.placement != "xor":
            raise problem(
                "storage.n_tok",
                self.n_tok,
                f"1 with pikv.storage.placement = {self.placement!r}; n_tok only acts in 'xor'",
            )
        check_companion("table", self.table, "placement", self.placement, "table")
        check_companion("gate_path", self.gate_path, "expert_ids", self.expert_ids, "gate")
        if self.table is not None:
            check_table(self.table, self.num_shards)
        return self


class HostPenaltyConfig(_Block):
    """What the model's own expert routers take off their logits, from the state of the cache; 0 and 0: nothing is installed."""

    load: float = Field(0, ge=0, allow_inf_nan=False, description="Strength: shard of the expert fuller than the mean of the shards.")
    miss: float = Field(0, ge=0, allow_inf_nan=False, description="Strength: log(1 + misses of the expert).")
    applies_to: Literal["selection", "selection_and_weights"] = Field(
        "selection", description="Choose experts by lowered logits and weigh them by the model's own, or lower both."
    )

    def build(self) -> RouterPenalty | None:
        """The penalty, or None when both strengths are 0."""
        from pikv_ds.host_penalty import RouterPenalty

        return RouterPenalty(load=self.load, miss=self.miss, applies_to=self.applies_to) if self.load or self.miss else None


class RoutingConfig(_Block):
    """Which pages a query reads. Other keys are the options of the router, see `pikv methods`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, validate_default=True)
    method: str = Field("all", description="KV router, see `pikv methods`.")
    budget_ratio: float | None = Field(None, gt=0, le=1, description="Pages a query reads per kv head, as a share of its request's tokens.")
    budget_pages: int | None = Field(None, ge=1, description="Pages a query reads per kv head and layer; in place of budget_ratio.")
    sink_tokens: int = Field(4, ge=0, description="First tokens of a request that every query reads, inside the budget.")
    recent_tokens: int = Field(64, ge=0, description="Latest tokens before a query that it always reads, inside the budget.")
    exchange: Literal["all", "needed"] = Field(
        "all", description="Distinct requests: the ranks that send back partial attention, all or those that read something (fewer bytes)."
    )
    host_penalty: HostPenaltyConfig = Field(HostPenaltyConfig(), description=HostPenaltyConfig.__doc__)

    def build(self) -> Router:
        """The router with its options."""
        from pikv_ds.routers import ROUTERS

        return ROUTERS.build(self.method, **self.model_extra)


class CodecConfig(_Block):
    """A codec: its method, a rotation before it, and as other keys the options of the method, see `pikv methods`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, validate_default=True)
    method: str = Field("none", description="Codec, see `pikv methods`.")
    rotate: Literal["none", "hadamard"] = Field("none", description="Rotation of what is stored, before it is rounded to few bits.")
    rotate_seed: int = Field(0, ge=0, lt=1 << 31, description="Chooses the random signs of the rotation.")

    def own(self) -> Codec:
        """The codec with its options, without what other blocks put in its place."""
        from pikv_ds.codecs import CODECS
        from pikv_ds.codecs.rotated import Rotated

        codec = CODECS.build(self.method, **self.model_extra)
        return codec if self.rotate == "none" else Rotated(codec, self.rotate_seed)


class LayerCompressionConfig(CodecConfig):
    """In which format entries of a layer are stored. Other keys are the options of the codec, see `pikv methods`."""

    k: CodecConfig | None = Field(None, description="Another codec for the keys; null = the same.")
    v: CodecConfig | None = Field(None, description="Another codec for the values; null = the same.")

    def build(self) -> Codec:
        """The codec of keys and values."""
        from pikv_ds.codecs.split import KVSplit

        own = self.own()
        if self.k is None and self.v is None:
            return own
        return KVSplit(self.k.own() if self.k else own, self.v.own() if self.v else own)

    def parts(self, key: str) -> Iterator[tuple[str, CodecConfig]]:
        """Every codec of the block and its key."""
        yield key, self
        for name in ("k", "v"):
            if getattr(self, name) is not None:
                yield f"{key}.{name}", getattr(self, name)


class CompressionConfig(LayerCompressionConfig):
    """In which format entries are stored. Other keys are the options of the codec, see `pikv methods`."""

    raw_sink_tokens: int | None = Field(None, ge=0, description="First tokens of a request that stay as computed; null = none.")
    raw_recent_tokens: int | None = Field(None, ge=0, description="Latest tokens of a request that stay as computed; null = none.")
    layers: dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]*)$")], LayerCompressionConfig] | None = Field(
        None, description="Layer index -> a block of this kind that holds for that layer in place of this one."
    )

    def build(self) -> Codec:
        """The codec of all layers."""
        from pikv_ds.codecs.split import PerLayer

        own = super().build()
        return PerLayer(own, {int(idx): block.build() for idx, block in self.layers.items()}) if self.layers else own

    def parts(self, key: str) -> Iterator[tuple[str, CodecConfig]]:
        yield from super().parts(key)
        for idx, block in (self.layers or {}).items():
            yield from block.parts(f"{key}.layers.{idx}")

    def build_near(self) -> Codec | None:
        """The codec of the entries that are not encoded by `build()`'s yet, or never: raw, or the light one. None = there are none."""
        from pikv_ds.codecs import CODECS

        codec = self.build()
        if codec.light is None and not (self.raw_sink_tokens or self.raw_recent_tokens):
            return None
        return codec.light or CODECS.build("none")


class SchedulingConfig(_Block):
    """Which entries stay. Other keys are the options of the retention policy, see `pikv methods`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, validate_default=True)
    method: str = Field("none", description="Retention policy, see `pikv methods`.")
    budget_tokens: int | None = Field(None, ge=1, description="Entries kept per request and full-attention layer.")
    budget_ratio: float | None = Field(None, gt=0, le=1, description="Entries kept, as a share of those appended; 0.25 evicts 4x.")
    budget_bytes: int | None = Field(None, ge=1, description="KV bytes kept per request, over all full-attention layers and ranks.")
    layer_budget: Literal["uniform", "pyramid"] = Field(
        "uniform", description="The same budget for every layer, or more for the first and less for the last (PyramidKV)."
    )
    head_budget: Literal["shared", "uniform", "adaptive"] = Field(
        "shared",
        description="One choice for all KV heads; the same number of entries of each head; or more for heads that need more (Ada-KV).",
    )
    head_floor: float = Field(0.2, ge=0, le=1, description="Share of its uniform budget that an adaptive head has at least.")
    granularity: Literal["page", "token"] = Field(
        "page", description="Whole pages leave, or single entries, and the others close up into fewer pages."
    )
    interval: int = Field(1, ge=1, description="Decode steps between two evictions; a prefill chunk is always followed by one.")
    prefill: Literal["evict", "keep"] = Field(
        "evict", description="Evict after every prefill chunk, or keep the whole prompt until the first decode step."
    )
    sink_tokens: int = Field(4, ge=0, description="First tokens of a request, never evicted; part of the budget.")
    recent_tokens: int = Field(64, ge=0, description="Latest tokens of a request, never evicted; part of the budget.")

    def build(self) -> RetentionPolicy:
        """The policy with its options."""
        from pikv_ds.policies import POLICIES

        return POLICIES.build(self.method, **self.model_extra)


class OffloadConfig(_Block):
    """Slower tiers. Not available in this version: only the values that mean "no tier" are legal."""

    host_gib: float = Field(0, ge=0, description="Host memory for cold pages in GiB; only 0 in this version.")
    nvme_path: str | None = Field(None, description="Folder for cold pages; only null in this version.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.host_gib > 0:
            raise problem("offload.host_gib", self.host_gib, "0: offload tiers are not available in this version")
        if self.nvme_path is not None:
            raise problem("offload.nvme_path", self.nvme_path, "null: offload tiers are not available in this version")
        return self


class MonitorConfig(_Block):
    """Metrics through DeepSpeed's monitor."""

    enabled: bool = Field(True, description="Write PiKV/<group>/<metric> to the monitors that DeepSpeed has configured.")
    interval: int = Field(100, ge=1, description="Decode steps between two writes.")


class PiKVConfig(_Block):
    """The "pikv" block of a DeepSpeed configuration."""

    preset: str | None = Field(
        None,
        description="Name of a configuration; replaced by its keys when the block is read, the keys given beside it override them.",
        json_schema_extra={"enum": [*PRESETS, None]},
    )
    enabled: bool = Field(True, description="false: nothing is patched and the host runs as without the block.")
    page_size: int | None = Field(None, ge=1, le=256, description="Tokens per page; null = the codec's preference.")
    timeout_s: float = Field(300, gt=0, allow_inf_nan=False, description="Longest wait for another rank, in seconds.")
    storage: StorageConfig = Field(StorageConfig(), description=StorageConfig.__doc__)
    routing: RoutingConfig = Field(RoutingConfig(), description=RoutingConfig.__doc__)
    compression: CompressionConfig = Field(CompressionConfig(), description=CompressionConfig.__doc__)
    scheduling: SchedulingConfig = Field(SchedulingConfig(), description=SchedulingConfig.__doc__)
    offload: OffloadConfig = Field(OffloadConfig(), description=OffloadConfig.__doc__)
    monitor: MonitorConfig = Field(MonitorConfig(), description=MonitorConfig.__doc__)

    def __init__(self, **block: Any) -> None:
        try:
            super().__init__(**block)
        except ValidationError as error:
            raise ConfigError(describe(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, block: Any) -> Any:
        return expand(block) if isinstance(block, dict) else block

    @model_validator(mode="after")
    def _check_methods(self) -> Self:
        # Imported here: the registries bring torch, which reading this file must not need.
        from pikv_ds.codecs import CODECS
        from pikv_ds.policies import POLICIES
        from pikv_ds.routers import ROUTERS

        for key, registry in (("routing", ROUTERS), ("scheduling", POLICIES)):
            check_method(key, getattr(self, key), registry)
        for key, block in self.compression.parts("compression"):
            check_method(key, block, CODECS)
        for key, block in self.compression.parts("compression"):
            check_ready(key, block)
            check_pools(key, block)
        check_retention(self.scheduling)
        try:
            page_size = self.resolve_page_size()
        except ValueError as error:
            raise problem("page_size", self.page_size, str(error)) from None
        check_budget(self.routing, page_size)
        check_exchange(self.routing, self.storage)
        check_experts(self.routing, self.storage)
        check_host_penalty(self.routing, self.storage)
        return self

    @classmethod
    def parse(cls, source: PiKVConfig | dict | str | Path | None) -> PiKVConfig:
        """From None (defaults), a PiKVConfig, the block, a DeepSpeed config that has it, or a JSON file of either."""
        if source is None:
            return cls()
        if isinstance(source, str | Path):
            source = _read_json(Path(source))
        if isinstance(source, dict) and "pikv" in source:
            source = source["pikv"]
        if isinstance(source, cls):
            return source
        if not isinstance(source, dict):
            raise ConfigError(f"pikv = {source!r}: legal is a JSON object with the keys {', '.join(cls.model_fields)}")
        not_text = [key for key in source if not isinstance(key, str)]
        if not_text:
            raise ConfigError(f"pikv has the key {not_text[0]!r}: keys are strings")
        return cls(**source)

    def resolve_page_size(self) -> int:
        """Tokens per page: `page_size`, or what the codec prefers."""
        return self.compression.build().page_size(self.page_size)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"configuration file {str(path)!r} is not valid JSON: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} appears twice in one object")
        found[key] = value
    return found
