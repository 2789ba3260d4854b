"""Which `apex` is installed: NVIDIA's, built from source, has a fused Adam; the project of that name on PyPI is another and has none."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

FUSED = ("optimizers", "fused_adam.py")
OTHER = "the PyPI project of that name, not NVIDIA's: that one is built from source, github.com/NVIDIA/apex"


class Apex(NamedTuple):
    """optimizer: the class FusedAdam, None where there is none to use; said: which apex it is, or why there is no optimizer."""

    optimizer: type | None
    said: str


def is_nvidias() -> bool | None:
    """None: no apex is installed. Looks at its files; imports nothing."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return None
    return any(Path(folder, *FUSED).is_file() for folder in found.submodule_search_locations or ())


def find_apex() -> Apex:
    """Imports apex where it is NVIDIA's. One that fails to import is said, and not used."""
    nvidias = is_nvidias()
    if nvidias is None:
        return Apex(None, "apex is not installed")
    if not nvidias:
        return Apex(None, f"the installed apex is {OTHER}")
    try:
        from apex.optimizers import FusedAdam
    except Exception as error:  # noqa: BLE001  whatever a build that does not fit this torch raises: ImportError, OSError, ...
        return Apex(None, f"apex fails to import ({type(error).__name__}: {error})")
    return Apex(FusedAdam, "FusedAdam of apex")
