"""Generated documents are what their programs write."""

import pytest

from .generated import DOCUMENTS


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_generated_document_is_up_to_date(name):
    target, written = DOCUMENTS[name]
    assert target.read_text(encoding="utf-8") == written(), f"python -m tests.docs {name}"
