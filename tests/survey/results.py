"""Where the rows of the survey are kept, and which of them count."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "survey.json"
SURVEYED = ("served", "refused", "wrong")
