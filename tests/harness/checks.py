"""What may hold of a Driver's forwards, as parts that a test puts together. B rows, T columns, H heads, D head_dim."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tests.harness.dense import dense_rows, rel_error
from tests.reference_cache import merge

if TYPE_CHECKING:
    from tests.harness.driver import Driver


class Check:
    """Something that holds of a Driver's forwards. A test lists those that it asks for; each is told what happens, in this order."""

    driver: Driver

    def opened(self, driver: Driver) -> None:
        """The cache is built, and empty."""
        self.driver = driver

    def generation(self) -> None:
        """A new generation begins, or the cache was reset."""

    def select(self, index: list[int]) -> None:
        """Row i continues row index[i], with the next forward."""

    def crop(self, keep: list[int]) -> None:
        """Rows keep so many tokens, from the next forward on."""

    def before(self, mask: Tensor) -> None:
        """Before a forward of mask [B, T]; rows have not moved yet."""

    def brought(self, i: int, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> None:
        """Before layer i stores and attends; k, v with anything where there is padding."""

    def layer(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        """What layer i has answered: q [B, T, Hq, Dk] at positions [B, T], out [B, T, Hq, Dv], lse [B, T, Hq]."""

    def after(self, mask: Tensor) -> None:
        """After a forward, with the driver's lens those of now."""


class Answers(Check):
    """Compares nothing, keeps (q, positions, out, lse) of every layer and forward."""

    def opened(self, driver: Driver) -> None:
        super().opened(driver)
        self.found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def layer(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        self.found.append((q, positions, out, lse))

    @property
    def last(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, out, lse."""
        q, _, out, lse = self.found[-1]
        return q, out, lse


class Finite(Check):
    def layer(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        real = positions >= 0
        assert bool(out[real].isfinite().all()) and bool(lse[real].isfinite().all())


class Dense(Check):
    """Every answer is dense attention in float64; one query of every forward also that of the reference cache, whole and in parts."""

    def layer(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        driver = self.driver
        spec, scale, wanted = driver.layers[i], driver.scale(q), []
        rows = [row for row in range(len(positions)) if bool((positions[row] >= 0).any())]
        for row in rows:
            real = positions[row] >= 0
            want = dense_rows(q[row, real], positions[row, real], driver.history[i][row], scale, spec.window)
            assert rel_error(out[row, real], want[0]) <= driver.tolerance, f"layer {i}, row {row}: out"
            assert rel_error(lse[row, real], want[1]) <= driver.tolerance, f"layer {i}, row {row}: lse"
            wanted.append(want)
        if rows and i == sum(driver.lens) % len(driver.layers):
            column = int((positions[rows[-1]] >= 0).nonzero()[-1])
            self._reference((i, rows[-1], q[rows[-1], column], int(positions[rows[-1], column]), scale, spec.window), wanted[-1])

    def _reference(self, query: tuple, wanted: tuple[Tensor, Tensor]) -> None:
        reference = self.driver.reference
        parts = merge(reference.partials(*query)), merge(reference.partials(*query, by_rank=True))
        for by in (reference.attend(*query), *parts):
            for got, want in zip(by, wanted, strict=True):
                assert rel_error(got, want[-1]) <= 1e-12, f"layer {query[0]}: reference"
