"""The "pikv" configuration block: what it consists of, and how it is read. Which methods combine is said in pikv_ds/blueprint."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from pydantic import ValidationError, model_validator

from pikv_ds.errors import ConfigError

from .blocks import Blocks
from .presets import expand
from .wording import describe, rules_of


class PiKVConfig(Blocks):
    """The "pikv" block of a DeepSpeed configuration."""

    def __init__(self, **block: Any) -> None:
        try:
            super().__init__(**block)
        except ValidationError as error:
            raise ConfigError(describe(error, type(self)), rule=rules_of(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, block: Any) -> Any:
        return expand(block) if isinstance(block, dict) else block

    @model_validator(mode="after")
    def _check_methods(self) -> Self:
        _blueprint().check(self)
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
        return _blueprint().page_size_of(self)


def _blueprint() -> ModuleType:
    """The one thing that the configuration asks of the methods: whether they combine. Late, as it brings torch."""
    from pikv_ds.blueprint import reading

    return reading


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
