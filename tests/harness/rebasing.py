"""Codec svd in a Driver: its block, and the forwards in which bases changed."""

from tests.harness.driver import Driver


def svd(rank: int = 16, fit_tokens: int = 100, **store) -> dict:
    return {"codec": "svd", "compression": {"rank": rank, "fit_tokens": fit_tokens} | store}


def rebased_rows(driver: Driver, before: list[int]) -> int:
    """How many rows have got another basis than the one that they were fitted at `before` tokens with. Rows must not have moved."""
    return sum(new != old for new, old in zip(driver.probe.fitted_at, before, strict=True))
