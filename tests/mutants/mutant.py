"""What a mutant is: one edit of one file, and the tests that should fail because of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tests/model_checker/test_model.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A source, and the narrow tests of it, in the order in which they are run; the model checker's short form comes after them."""

    file: str
    tests: tuple[str, ...]
    model: bool = True

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        return (self.tests, (MODEL,)) if self.model else (self.tests,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """text: of the whole file, with the bug. what: the bug, in words or as before -> after."""

    name: str
    place: Place
    what: str
    text: str


def planted(place: Place, name: str, what: str, old: str, new: str) -> Mutant:
    """`old` stands once in the file, and `new` takes its place. Raises: ValueError, when the source has moved on."""
    text = (ROOT / place.file).read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(f"mutant {name}: {old!r} stands {text.count(old)} times in {place.file}, not once; bring it up to date")
    return Mutant(name=f"{Path(place.file).stem}/{name}", place=place, what=what, text=text.replace(old, new))
