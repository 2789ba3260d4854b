from pathlib import Path

JOBS = Path(__file__).resolve().parent / "jobs"
