"""Which documents are made by a program, and by which function."""

from collections.abc import Callable
from pathlib import Path

from tests.packaging import file_map

from . import (
    commands_reference,
    config_reference,
    generate_reference,
    hosts_reference,
    methods_reference,
    models_reference,
    modes_reference,
    picture,
    rules_reference,
)

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"

DOCUMENTS: dict[str, tuple[Path, Callable[[], str]]] = {
    "config": (REFERENCE / "config.md", config_reference.written),
    "methods": (REFERENCE / "methods.md", methods_reference.written),
    "modes": (REFERENCE / "modes.md", modes_reference.written),
    "models": (REFERENCE / "models.md", models_reference.written),
    "rules": (REFERENCE / "rules.md", rules_reference.written),
    "commands": (REFERENCE / "commands.md", commands_reference.written),
    "generate": (REFERENCE / "generate.md", generate_reference.written),
    "hosts": (REFERENCE / "hosts.md", hosts_reference.written),
    "files": (file_map.TARGET, file_map.written),
    "picture": (ROOT / "docs" / "figures" / "readme.svg", picture.written),
}
