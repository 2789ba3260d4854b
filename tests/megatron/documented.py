"""The code that docs/guide/megatron.md shows, for the jobs that run it."""

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "megatron.md").read_text()


NAMES = {
    "import": "PiKVInferenceContext, enable",
    "from_config": ".from_config(",
    "constructor": "PiKVInferenceContext(\n",
    "install": "install(",
}


def diffs(*names: str) -> list[str]:
    """The lines a user adds to a script: "from_config" and "constructor" for static ones of two versions, or "install"."""
    found = re.findall(r"```diff\n(.*?)```", TEXT, re.S)
    named = {name: [diff for diff in found if mark in diff] for name, mark in NAMES.items()}
    assert len(found) == len(NAMES) and all(len(diff) == 1 for diff in named.values()), "docs/guide/megatron.md shows other diffs"
    wanted = ["import", *names] if set(names) & {"from_config", "constructor"} else names
    return [named[name][0] for name in wanted]


def patched(script: str, diffs: list[str]) -> str:
    for diff in diffs:
        lines = diff.splitlines(keepends=True)
        old, new = ("".join(line[1:] or "\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert script.count(old) == 1, f"the script has no place, or several, for\n{diff}"
        script = script.replace(old, new)
    return script


def code(containing: str) -> str:
    """The one Python block that has these characters."""
    found = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if containing in block]
    assert len(found) == 1, f"docs/guide/megatron.md shows {len(found)} Python blocks with {containing!r}"
    return found[0]


def run(containing: str, **names) -> dict:
    """Run that block with these names defined; what it defines."""
    exec(compile(code(containing), "docs/guide/megatron.md", "exec"), names)
    return names
