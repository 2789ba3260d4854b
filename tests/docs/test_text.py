"""The rules for text: short paragraphs, and links that lead somewhere."""

import re
import shlex

import pytest

from pikv_ds.launch.cli import build_parser

from .generated import ROOT

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST = 500  # characters of a paragraph; tables, lists and code are excepted
EXCEPTED = re.compile(r"\s*([-*+] |\d+\. |\||#|<!--|!\[)")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
NAMES = [str(file.relative_to(ROOT)) for file in FILES]


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)


def paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", without_code(text)) if part.strip() and not EXCEPTED.match(part)]


def anchors(text: str) -> set[str]:
    """Those that GitHub gives to headings."""
    heads = re.findall(r"^#+ (.*)$", without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_paragraphs_are_short(file):
    long = [f"{len(part)} characters: {part[:60]}" for part in paragraphs(file.read_text(encoding="utf-8")) if len(part) > MOST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_links_lead_somewhere(file):
    for found in LINK.findall(without_code(file.read_text(encoding="utf-8"))):
        path, _, anchor = "".join(found).partition("#")
        if re.match(r"\w+:", path):
            continue
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{file.relative_to(ROOT)} links to {path}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{file.relative_to(ROOT)}: {path}#{anchor}"


def test_what_is_too_long_and_what_is_excepted():
    text = "a\n\n- item\n\n| cell |\n\n```\n\ncode\n```\n\nb c\nd\n\n## head"
    assert paragraphs(text) == ["a", "b c\nd"]
    assert anchors("# KIVI's layout, 2\n") == {"kivis-layout-2"}


def test_every_document_is_in_an_index():
    indexes = [ROOT / "docs" / "README.md", ROOT / "docs" / "results" / "README.md"]
    linked = {(file.parent / link.partition("#")[0]).resolve() for file in indexes for link, _ in LINK.findall(file.read_text())}
    absent = [str(file.relative_to(ROOT)) for file in FILES[1:] if file not in linked and file != indexes[0]]
    assert not absent, f"neither docs/README.md nor docs/results/README.md links to {absent}"


def commands(text: str) -> list[str]:
    """Lines of code blocks that call pikv, without comments and what is chained behind them."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.M | re.S)
    return [re.split(r" +#| && ", line)[0] for block in blocks for line in block.splitlines() if line.startswith("pikv ")]


def test_every_command_in_the_text_parses():
    parser, found = build_parser(), [(name, line) for name, file in zip(NAMES, FILES, strict=True) for line in commands(file.read_text())]
    for name, line in found:
        try:
            parser.parse_args(shlex.split(line)[1:])
        except SystemExit:
            pytest.fail(f"{name}: {line}")
    assert len(found) > 20
