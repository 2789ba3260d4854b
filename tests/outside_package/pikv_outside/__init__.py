"""A codec, a router and a retention policy: the entry point names this package, so it must import their modules."""

from . import coarse_int8, expected_mass, norm_ratio  # noqa: F401
