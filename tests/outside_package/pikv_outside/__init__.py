"""A codec, a router, a retention policy and a page pool: the entry point names this package, so it must import their modules."""

from . import coarse_int8, expected_mass, norm_ratio, older_int4  # noqa: F401
