"""Codec svd in a Driver: its block, and the forwards in which bases changed."""

from tests.unit.driver import Driver


def svd(rank: int = 16, fit_tokens: int = 100, **store) -> dict:
    return {"codec": "svd", "compression": {"rank": rank, "fit_tokens": fit_tokens} | store}


def turns(driver: Driver) -> list[int]:
    """How many rows each turn of a layer's store is for, filled in while the driver runs."""
    seen, settle = [], driver.cache.bases.settle

    def counting(*given):
        turned = settle(*given)
        seen.extend(len(turn.rows) for _, turn in turned)
        return turned

    driver.cache.bases.settle = counting
    return seen
