"""The list of files in the documents is what the files say of themselves, and each says something."""

import pytest

from tests.packaging import file_map
from tests.packaging.imports import FILES, ROOT


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(path):
    assert file_map.says(path), f"{path.relative_to(ROOT)} has no docstring, nor has its class"


def test_the_list_is_up_to_date():
    assert file_map.TARGET.read_text(encoding="utf-8") == file_map.written(), "python -m tests.packaging.file_map --write"
