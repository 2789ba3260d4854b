"""What is run: the legs of each host, and the smoke set of each leg."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version

HOSTS = ("transformers", "deepspeed", "megatron-core")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore")

SMOKE: dict[str, tuple[str, ...]] = {
    "attach": ("-m", "tests.hosts.attach"),
    "autoep": (*PYTEST, "tests/adapters/test_deepspeed_engines.py", "-k", "autoep"),
    "static engine": (*PYTEST, "tests/megatron/test_engine.py"),
    "dynamic": (*PYTEST, "tests/megatron/test_dynamic.py"),
    "checkpoint": (*PYTEST, *(f"tests/megatron/test_{name}.py" for name in ("checkpoints", "trained")), "-k", "across_layouts or trained"),
    "features": (*PYTEST, "tests/megatron/test_features.py", "tests/megatron/test_hybrid.py"),
    "engines": (*PYTEST, *(f"tests/megatron/test_{name}.py" for name in ("dynamic_engine", "coordinator", "drop_in"))),
}
"""Name -> arguments of the Python of the leg's environment, run in the repository."""

OF_HOST = {
    "transformers": ("attach", "autoep"),
    "deepspeed": ("autoep",),
    "megatron-core": ("static engine", "dynamic", "checkpoint", "features", "engines"),
}
BETWEEN = {"transformers": ("attach",)}
"""Of releases that are neither the lowest nor the pinned nor the newest; other hosts: all of it."""


@dataclass(frozen=True, slots=True)
class Leg:
    host: str
    version: str
    python: str
    """3.11, 3.12"""
    smoke: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.host} {self.version} on Python {self.python}"

    @property
    def slug(self) -> str:
        return f"{self.host}-{self.version}-py{self.python}"


def legs(host: str, python: str, releases: Iterable[str], claimed: SpecifierSet, pinned: str | None, every: bool = False) -> list[Leg]:
    """Lowest, pinned and newest of the claimed releases with the whole smoke set, and the release below with attach or all.

    every: also those in between. Oldest first.
    """
    ordered = sorted(releases, key=Version)
    inside = [release for release in ordered if release in claimed]
    if not inside:
        return []
    ends = {inside[0], inside[-1]} | ({pinned} & set(inside))
    below = [release for release in ordered if Version(release) < Version(inside[0])][-1:]
    made = []
    for release in below + [one for one in inside if every or one in ends]:
        smoke = OF_HOST[host] if release in ends else BETWEEN.get(host, OF_HOST[host])
        made.append(Leg(host, release, python, smoke))
    return made


def running_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
