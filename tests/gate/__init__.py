"""The bench gate: `python -m tests.gate`, see __main__.py."""
