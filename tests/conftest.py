"""Fixtures shared by all tests."""

from hypothesis import settings

# Tests share their machine with others: a slow example is no failure.
settings.register_profile("pikv", deadline=None)
settings.load_profile("pikv")
