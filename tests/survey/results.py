"""Where the rows of the survey are kept, and which of them count."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "survey.json"
NEWEST = RESULTS.with_name("survey_newest.json")
"""Families that the newest transformers in range has beyond the pinned one's."""
SURVEYED = ("served", "refused", "wrong")
