"""docs/CONTRIBUTING.md: the table "Where does it go" names files and tests that exist."""

import re

from .generated import ROOT

TEXT = (ROOT / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")


def rows() -> list[list[str]]:
    """[what, files to add, files to touch, tests] of each row."""
    section = TEXT.partition("## Where does it go\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    return lines[1:]


def test_every_path_in_the_table_exists():
    checked = 0
    for what, add, touch, tests in rows():
        for path in re.findall(r"`([^`]+)`", f"{touch} {tests}"):
            if "/" in path:
                assert (ROOT / path).exists(), f"{what}: {path}"
                checked += 1
        for path in re.findall(r"`([^`]+)`", add):
            assert (ROOT / path.partition("NAME")[0]).is_dir(), f"{what}: {path}"
    assert checked > 40


def test_every_row_names_a_test_that_can_be_run():
    for what, _, _, tests in rows():
        files = re.findall(r"`(tests/[\w/]+/test_\w+\.py)`", tests)
        assert files and all(re.search(r"^ *def test_", (ROOT / file).read_text(), re.M) for file in files), what


def test_every_path_in_the_text_exists():
    for path in re.findall(r"`((?:tests|launch|pikv_ds|docs|ops)/[\w/.]+)`", TEXT):
        assert "NAME" in path or (ROOT / path).exists(), path
