"""A case on a tiny cache, and what must hold of it: equal to dense attention where it is, else within what the codec declares, else whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pikv_ds.cache.stats import stats
from tests.held import check_bytes
from tests.unit.driver import Driver, dense_rows, ragged, rel_error
from tests.unit.invariants import check_pages, check_unshared, slots_of

from .settings import EXPERTS, Case, blocks, layers_of, least

MAPPED = 1e-4  # relative error of f32 maps that keep all directions
LINEAR = ("svd", "lora", "lora_plus", "unrotated", "crop")


class CoveringDriver(Driver):
    def __init__(self, case: Case, folder: Path) -> None:
        block = blocks(case, folder)
        self.case = case
        super().__init__(
            layers_of(case), num_experts=EXPERTS, page_size=block["page_size"], compression=block["compression"],
            routing=block["routing"], scheduling=block["scheduling"], **block["storage"],
        )  # fmt: skip
        codec, maps = self.cache.codec, any(plan.transform is not None for plan in self.cache.blueprint.pages.layers)
        self.errors = [codec.declared_errors(spec, self.cache.page_size, torch.float32) for spec in self.layers]
        self.reads_all, self.keeps_all = self.cache.selection is None, self.cache.retention is None
        self.tolerance = MAPPED if maps or self.cache.bases is not None else self.tolerance
        self.compared = {"exact": 0, "bounded": 0, "whole": 0}

    def _compare(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        real = positions >= 0
        assert bool(out[real].isfinite().all()) and bool(lse[real].isfinite().all()), f"layer {i}: not finite"
        if not (self.reads_all and self.keeps_all):
            self.compared["whole"] += 1
        elif self._keeps_all_directions(i):
            super()._compare(i, q, positions, out, lse)
            self.compared["exact"] += 1
        else:
            self._within_declared_errors(i, q, positions, out, lse)

    def _keeps_all_directions(self, i: int) -> bool:
        """Records are raw, so that maps of full width lose nothing but roundings."""
        formats = (self.cache.tables.formats[i], self.cache.tables.far_formats[i])
        return all(fmt is None or (fmt.k_rel_error == fmt.v_rel_error == 0) for fmt in formats)

    def _within_declared_errors(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        """A logit is off by at most d = scale |q| e_k max|k|, so lse by d, and out by (e^2d - 1 + e_v) times the largest value."""
        spec, scale = self.layers[i], self._scale(q)
        if self.case["codec"] in LINEAR:  # errors are declared for the calibration's own entries
            self.compared["whole"] += 1
            return
        k_error, v_error = self.errors[i]
        for row in range(len(positions)):
            real = positions[row] >= 0
            if not bool(real.any()):
                continue
            entries = self.history[i][row]
            k_norm, v_norm = (max(float(entry[side].norm(dim=-1).max()) for entry in entries) for side in range(2))
            want_out, want_lse = dense_rows(q[row, real], positions[row, real], entries, scale, spec.window)
            off = scale * q[row, real].double().norm(dim=-1) * k_error * k_norm + 1e-5  # [T, Hq]
            assert bool(((lse[row, real].double() - want_lse).abs() <= off).all()), f"layer {i}, row {row}: lse is off by more than declared"
            error = (out[row, real].double() - want_out).norm(dim=-1)
            most = v_norm * (torch.expm1(2 * off) * (1 + v_error) + v_error) + 1e-5
            assert bool((error <= most).all()), f"layer {i}, row {row}: out is off by more than declared"
        self.compared["bounded"] += 1

    def forward(self, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        outputs = super().forward(mask)
        self.check()
        return outputs

    def check(self) -> None:
        """Between forwards: pages, bytes, entries once, budgets and pins."""
        tables, numbers = self.cache.tables, stats(self.cache, 1, 1)
        for store in tables.all_stores:
            check_pages(store)
            check_unshared(store)
        check_bytes(self.cache)
        live, appended, forked = (numbers[f"entries_{name}"] for name in ("live", "appended", "forked"))
        gone = sum(numbers[f"entries_{name}"] for name in ("expired", "evicted", "cropped"))
        assert live + gone == appended + forked, "entries were lost or counted twice"
        for i, spec in enumerate(self.layers):
            for row, length in enumerate(self.lens):
                for head in range(tables.heads):
                    self._check_row(i, spec, row, length, head)

    def _check_row(self, i: int, spec, row: int, length: int, head: int) -> None:
        held = []
        for store in self.cache.tables.pools(i):
            for table in range(head, store.counts.shape[1], self.cache.tables.heads):
                held += store.positions.flatten()[slots_of(store, row, table).long()].tolist()
        assert len(set(held)) == len(held), f"layer {i}, row {row}: a position is stored twice"
        if spec.window is not None:
            assert set(range(max(0, length - spec.window + 1), length)) <= set(held), f"layer {i}, row {row}: a visible entry is gone"
            return
        if self.keeps_all:
            assert sorted(held) == list(range(length)), f"layer {i}, row {row}: not every entry is there"
            return
        block = self.cache.config.scheduling
        pins = {p for p in range(length) if p < block.sink_tokens or p >= length - block.recent_tokens}
        assert pins <= set(held), f"layer {i}, row {row}: a pinned entry is gone"

    def check_budgets(self) -> None:
        """Right after an eviction: every request is within what it may keep, in all layers and heads together."""
        tables, retention = self.cache.tables, self.cache.retention
        for row, length in enumerate(self.lens):
            for i, budget in zip(retention.layers, retention.budgets.of(length), strict=True):
                held = sum(int(store.counts[row].sum()) for store in tables.pools(i))
                assert held <= budget * tables.heads, f"layer {i}, row {row}: {held} entries, {budget} a head are allowed"


def run(case: Case, folder: Path) -> CoveringDriver:
    """A prompt, a chunk, decoding, a fork, a crop that was announced, another generation."""
    driver = CoveringDriver(case, folder)
    page, evicts = case["page_size"], not driver.keeps_all
    driver.prefill([max(2 * page, 30) + 5 + (least(case) if evicts else 0), 9])
    driver.forward(ragged([3, 0]))
    for _ in range(4):
        driver.decode()
    if evicts and case["interval"] == 1:
        driver.check_budgets()
    driver.select([1, 0, 0])
    driver.decode()
    driver.announce_crops()
    driver.forward(ragged([4, 4, 4]))
    driver.crop([n - 3 for n in driver.lens])
    driver.cache.hold_margin = None
    driver.decode()
    driver.prefill([page + 3])
    driver.decode()
    return driver
