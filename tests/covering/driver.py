"""A case on a tiny cache, and what must hold: it answers as dense attention does, or within what the codec declares, and stays whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pikv_ds.cache.stats import stats
from tests.harness.checks import Check, Dense, Finite
from tests.harness.dense import dense_rows
from tests.harness.driver import Driver, ragged
from tests.harness.invariants import check_pages, check_unshared
from tests.held import check_bytes

from .settings import EXPERTS, Case, blocks, layers_of, least

MAPPED = 1e-4  # relative error of f32 maps that keep all directions
LINEAR = ("svd", "lora", "lora_plus", "unrotated", "crop")


class Right(Dense):
    """Where everything is read and kept: raw records answer as dense attention does, others are off by no more than they declare."""

    def __init__(self, case: Case) -> None:
        self.linear, self.exact, self.bounded = case["codec"] in LINEAR, 0, 0

    def opened(self, driver: Driver) -> None:
        super().opened(driver)
        blueprint = driver.cache.blueprint
        if blueprint.codec.per_request or any(plan.transform is not None for plan in blueprint.pages.layers):
            driver.tolerance = MAPPED
        self.everything = blueprint.router.reads_all and blueprint.policy.keeps_all
        self.errors = [blueprint.codec.pool(spec, driver.cache.page_size, torch.float32).declared_errors for spec in driver.layers]
        formats = [[pool.fmt for pool in plan.pools] for plan in blueprint.pages.layers]
        self.raw = [all(fmt.k_rel_error == fmt.v_rel_error == 0 for fmt in own) for own in formats]

    def layer(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        if not self.everything:
            return
        if self.raw[i]:
            super().layer(i, q, positions, out, lse)
            self.exact += 1
        elif not self.linear:  # theirs are declared for the calibration's own entries
            for row in range(len(positions)):
                real = positions[row] >= 0
                if bool(real.any()):
                    self._bounded(i, row, q[row, real], positions[row, real], out[row, real], lse[row, real])
            self.bounded += 1

    def _bounded(self, i: int, row: int, q: Tensor, at: Tensor, out: Tensor, lse: Tensor) -> None:
        """A logit is off by at most d = scale |q| e_k max|k|, so lse by d, and out by (e^2d - 1 + e_v) times the largest value."""
        driver, (k_error, v_error) = self.driver, self.errors[i]
        scale, entries = driver.scale(q), driver.history[i][row]
        k_norm, v_norm = (max(float(entry[side].norm(dim=-1).max()) for entry in entries) for side in range(2))
        want_out, want_lse = dense_rows(q, at, entries, scale, driver.layers[i].window)
        off = scale * q.double().norm(dim=-1) * k_error * k_norm + 1e-5  # [T, Hq]
        assert bool(((lse.double() - want_lse).abs() <= off).all()), f"layer {i}, row {row}: lse is off by more than declared"
        most = v_norm * (torch.expm1(2 * off) * (1 + v_error) + v_error) + 1e-5
        assert bool(((out.double() - want_out).norm(dim=-1) <= most).all()), f"layer {i}, row {row}: out is off by more than declared"


class Whole(Check):
    """Between forwards: pages and bytes, every entry once, nothing pinned or visible gone, nothing read twice."""

    def after(self, mask: Tensor) -> None:
        driver = self.driver
        for pool in driver.probe.all_pools:
            check_pages(pool)
            check_unshared(pool)
        check_bytes(driver.cache)
        numbers = stats(driver.cache, 1, 1)
        gone = sum(numbers[f"entries_{name}"] for name in ("expired", "evicted", "cropped"))
        live, appended, forked = (numbers[f"entries_{name}"] for name in ("live", "appended", "forked"))
        assert live + gone == appended + forked, "entries were lost or counted twice"
        read = driver.probe.read
        assert read is None or read.entries <= read.visible, "more is read than there is"
        for i in range(len(driver.layers)):
            for row, length in enumerate(driver.lens):
                for head in range(driver.probe.heads):
                    self._row(i, row, length, self.held(i, row, head))

    def held(self, i: int, row: int, head: int) -> list[int]:
        """Positions of a row in the pages of one head, or in those of all."""
        pools, heads = self.driver.probe.pools(i), self.driver.probe.heads
        return [p for pool in pools for table in range(head, pool.num_tables, heads) for p in pool.positions(row, table)]

    def _row(self, i: int, row: int, length: int, held: list[int]) -> None:
        where, window, block = f"layer {i}, row {row}", self.driver.layers[i].window, self.driver.cache.config.scheduling
        assert len(set(held)) == len(held), f"{where}: a position is stored twice"
        if window is not None:
            assert set(range(max(0, length - window + 1), length)) <= set(held), f"{where}: a visible entry is gone"
        elif self.driver.cache.blueprint.policy.keeps_all:
            assert sorted(held) == list(range(length)), f"{where}: not every entry is there"
        else:
            pins = {p for p in range(length) if p < block.sink_tokens or p >= length - block.recent_tokens}
            assert pins <= set(held), f"{where}: a pinned entry is gone"

    def check_budgets(self) -> None:
        """Right after an eviction: every request is within what it may keep, in all heads together."""
        driver, budgets = self.driver, self.driver.cache.blueprint.budgets
        full = [i for i, spec in enumerate(driver.layers) if spec.window is None]
        for row, length in enumerate(driver.lens):
            for i, budget in zip(full, budgets.of(length), strict=True):
                held = sum(len(self.held(i, row, head)) for head in range(driver.probe.heads))
                assert held <= budget * driver.probe.heads, f"layer {i}, row {row}: {held} entries, {budget} a head are allowed"


def run(case: Case, folder: Path) -> Right:
    """A prompt, a chunk, decoding, a fork, a crop that was announced, another generation."""
    block, right, whole = blocks(case, folder), Right(case), Whole()
    driver = Driver(
        layers_of(case), num_experts=EXPERTS, page_size=block["page_size"], compression=block["compression"], routing=block["routing"],
        scheduling=block["scheduling"], checks=[Finite(), right, whole], **block["storage"],
    )  # fmt: skip
    page, evicts = case["page_size"], not driver.cache.blueprint.policy.keeps_all
    driver.prefill([max(2 * page, 30) + 5 + (least(case) if evicts else 0), 9])
    driver.forward(ragged([3, 0]))
    for _ in range(4):
        driver.decode()
    if evicts and case["interval"] == 1:
        whole.check_budgets()
    driver.select([1, 0, 0])
    driver.decode()
    driver.announce_crops()
    driver.forward(ragged([4, 4, 4]))
    driver.crop([n - 3 for n in driver.lens])
    driver.end_crops()
    driver.decode()
    driver.prefill([page + 3])
    driver.decode()
    return right
