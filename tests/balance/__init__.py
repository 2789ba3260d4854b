"""The planner of placements against EPLB: `python -m tests.balance`, see __main__.py."""
