"""What `pikv train` was given, read: the part with its options, the text, the file to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pikv_ds.training.part import LearnedPart


def part_of(name: str, given: list[str]) -> LearnedPart:
    import inspect

    from pikv_ds.errors import ConfigError
    from pikv_ds.training.parts import PARTS

    if name not in PARTS.names():
        raise ConfigError(f"no part {name!r} to train; legal are {', '.join(PARTS.names())}")
    legal = [p.name for p in inspect.signature(PARTS.get(name).__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = {}
    for one in given:
        key, sign, value = one.partition("=")
        if not sign or key not in legal:
            raise ConfigError(f"--set {one}: legal is NAME=VALUE, with a name among {', '.join(legal)} for the part {name!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    try:
        return PARTS.build(name, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--set {' '.join(given)}: {error}") from None


def text_of(file: str | None) -> str:
    from pikv_ds.bundled import calibration_text

    if file is None:
        return calibration_text()
    if not Path(file).is_file():
        raise FileNotFoundError(f"no text file {file!r}; --text is a UTF-8 text")
    return Path(file).read_text(encoding="utf-8")


def out_of(file: str) -> Path:
    out = Path(file).expanduser()
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(out.parent)!r} to write --out {file} to")
    return out
