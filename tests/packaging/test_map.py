"""docs/ARCHITECTURE.md names every file of the core."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAP = (ROOT / "docs" / "ARCHITECTURE.md").read_text()


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "pikv_ds").glob("[a-z]*.py")))
def test_every_file_of_the_core_is_on_the_map(file):
    assert f"`{file}`" in MAP or f"/{file}`" in MAP, f"docs/ARCHITECTURE.md does not say what {file} is for"
