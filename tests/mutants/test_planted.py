"""The list of mutants is up to date: every edit is of text that stands in its file, and every mutant is a program."""

import ast

from .mutant import ROOT
from .planted import mutants
from .survivors import WHY


def test_every_mutant_can_be_planted():
    found = mutants()
    assert len(found) >= 400
    assert set(WHY) <= {each.name for each in found}, "survivors.py explains mutants that are not there"
    sources: dict[str, str] = {}
    for each in found:
        source = sources.setdefault(each.place.file, (ROOT / each.place.file).read_text(encoding="utf-8"))
        assert each.text != source, each.name
        ast.parse(each.text)
        assert all((ROOT / file.partition("::")[0]).is_file() for stage in each.place.stages for file in stage), each.name
