"""The "pikv" configuration block: every key, its range, and the checks that involve more than one key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from pikv_ds.errors import ConfigError

from .block import Block
from .checks import (
    check_budget,
    check_exchange,
    check_experts,
    check_host_penalty,
    check_method,
    check_pools,
    check_ready,
    check_retention,
)
from .compression import CompressionConfig
from .presets import PRESETS, expand
from .routing import RoutingConfig
from .scheduling import SchedulingConfig
from .storage import StorageConfig
from .wording import describe, problem


class OffloadConfig(Block):
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


class MonitorConfig(Block):
    """Metrics through DeepSpeed's monitor."""

    enabled: bool = Field(True, description="Write PiKV/<group>/<metric> to the monitors that DeepSpeed has configured.")
    interval: int = Field(100, ge=1, description="Decode steps between two writes.")


class PiKVConfig(Block):
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
