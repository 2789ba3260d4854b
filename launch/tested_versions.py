"""The versions of its hosts that this pikv_ds was tested with: the ranges of its own requirements, as they were installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

OUTSIDE = "OUTSIDE of "


def tested_ranges() -> dict[str, SpecifierSet] | None:
    """By name, for this Python; None where pikv-ds is not installed and so has no metadata (a checkout on PYTHONPATH)."""
    try:
        texts = requires("pikv-ds") or []
    except PackageNotFoundError:
        return None
    ranges = {}
    for text in texts:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            ranges[canonicalize_name(requirement.name)] = requirement.specifier
    return ranges


def verdict(name: str, version: str | None, ranges: dict[str, SpecifierSet] | None) -> str:
    """In words: of what was tested, or outside of which range. "" for what no range is given of, or what is not installed."""
    if version is None:
        return ""
    if ranges is None:
        return "unknown: pikv-ds is not installed, its ranges are not there"
    tested = ranges.get(canonicalize_name(name))
    if not tested:
        return ""
    shown = ",".join(sorted(map(str, tested), key=lambda part: "<" in part))
    return shown if tested.contains(version, prereleases=True) else OUTSIDE + shown
