"""The code that docs/guide/megatron.md shows, for the jobs that run it."""

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "megatron.md").read_text()


def diffs() -> list[str]:
    """The lines a user adds to a static-inference script."""
    found = re.findall(r"```diff\n(.*?)```", TEXT, re.S)
    assert len(found) == 2, "docs/guide/megatron.md no longer shows two diffs"
    return found


def code(containing: str) -> str:
    """The one Python block that has these characters."""
    found = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if containing in block]
    assert len(found) == 1, f"docs/guide/megatron.md shows {len(found)} Python blocks with {containing!r}"
    return found[0]


def run(containing: str, **names) -> dict:
    """Run that block with these names defined; what it defines."""
    exec(compile(code(containing), "docs/guide/megatron.md", "exec"), names)
    return names
