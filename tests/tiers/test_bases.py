"""Bases of requests: what is stored is turned at its slots, in every format; sums and bases follow the rows; freezing."""

import pytest
import torch

from pikv_ds import ops
from pikv_ds.blueprint.blueprint import Blueprint
from pikv_ds.codecs import CODECS
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.raw import RawReader
from pikv_ds.pages.rebase import rebase
from pikv_ds.pages.rows import RowChange
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.spec import LayerSpec
from pikv_ds.step.agreement import Agreed
from pikv_ds.step.step import LocalStep, Step
from pikv_ds.tiers.bases import NEVER, RequestBases
from tests.harness.driver import Driver, layer, ragged
from tests.harness.rebasing import svd

CPU = torch.device("cpu")

SPEC = LayerSpec(layer_idx=0, num_kv_heads=2, k_dim=16, v_dim=16)


def entries(pool, row, shard):
    """k, v [tokens, H, r] f32 and positions of one table, as attention reads them."""
    fmt, count, table = pool.fmt, int(pool.table.counts[row, shard]), pool.table.ids[row, shard]
    pages = table[: -(-count // fmt.page_size)].long()
    k, v = (x.transpose(1, 2).flatten(0, 1)[:count].float().clone() for x in ops.decode_pages(pool.pages[pages], fmt))
    if fmt.grouped and count % fmt.group:
        tail = pool.tail[row * pool.table.counts.shape[1] + shard]
        k[count - count % fmt.group :] = tail[:, : count % fmt.group].transpose(0, 1).float()
    return k, v, pool.positions[pages].flatten()[:count].clone()


@pytest.mark.parametrize("name", ["none", "int8", "int4", "fp8_e4m3"])
def test_another_basis_multiplies_every_entry_of_its_rows_and_no_other(name):
    codec = CODECS.build(name)
    page_size, num_rows, shards, tokens = codec.page_size(None), 3, 2, 150
    fmt = codec.page_format(SPEC, page_size, torch.float32)
    counts = torch.zeros(num_rows, shards, dtype=torch.int32)
    pool = PagePool(fmt, torch.float32, counts, torch.zeros((), dtype=torch.int64), RawReader)
    pool.reserve(0, num_rows * shards * 6, 6)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(num_rows).repeat_interleave(tokens)
    k, v = (torch.randn(len(rows), 2, 16, generator=generator) for _ in range(2))
    shard = torch.randint(0, shards, (len(rows),), generator=generator)
    positions = torch.arange(tokens, dtype=torch.int32).repeat(num_rows)
    here = torch.ones(len(rows), dtype=torch.bool)
    pool.append(rows, shard, here, positions, k, v, one_per_row=False, may_open=True, all_valid=False)
    changes = [torch.linalg.qr(torch.randn(2, 2, 16, 16, generator=generator))[0] for _ in range(2)]
    before = {(row, s): entries(pool, row, s) for row in range(num_rows) for s in range(shards)}
    rebase(pool, torch.tensor([2, 0]), *changes)
    for (row, s), old in before.items():
        found = entries(pool, row, s)
        assert torch.equal(found[2], old[2]) and int(pool.table.counts[row, s]) == len(old[0])
        for x, x_old, by, most in zip(found, old, changes, (fmt.k_rel_error, fmt.v_rel_error), strict=False):
            want = x_old if row == 1 else torch.einsum("nhr,hrs->nhs", x_old, by[0 if row == 2 else 1])
            error = ((x - want).norm() / want.norm()).item()
            assert error == 0 if row == 1 else error <= max(most, 1e-6), (name, row, s, error)


def local(num_new, parent, keep, columns=4):
    positions = torch.full((len(num_new), columns), -1, dtype=torch.int32)
    for row, (new, begin) in enumerate(zip(num_new, keep, strict=True)):
        positions[row, :new] = torch.arange(begin, begin + new)
    fresh = all(p < 0 for p in parent)
    return LocalStep(num_rows=len(num_new), num_columns=columns, num_new=num_new, parent=parent, keep=keep, positions=positions, digest=0,
                     identity=parent == list(range(len(parent))), fresh=fresh)  # fmt: skip


class Run:
    """Forwards of one rank through the bases, with the agreement's part done by hand and nothing stored."""

    def __init__(self, fit_tokens=16):
        config = PiKVConfig(page_size=4, compression={"method": "svd", "rank": 8, "fit_tokens": fit_tokens})
        blueprint = Blueprint.of(config, [SPEC], torch.float32, num_experts=8)
        self.bases = RequestBases(blueprint.pages, blueprint.codec, CPU, Exchange(None, 10.0))
        self.pages = RankPages(blueprint.pages, config.storage, ShardMap.blocks(1, 0, 1, CPU), 8, CPU, self.bases.far_maps)

    def forward(self, num_new, parent, keep, seed):
        step = local(num_new, parent, keep)
        self.bases.begin(step)
        if not step.identity or step.fresh:
            self._change(step, Agreed([(step.num_rows, 4)], parent, keep, num_new, step.fresh, step.identity))
        k = torch.randn(len(num_new), 4, 2, 16, generator=torch.Generator().manual_seed(seed))
        k[step.positions < 0] = torch.nan  # padding may hold anything
        maps = self.bases.maps(0, k, k.clone())
        after = [a + b for a, b in zip(keep, num_new, strict=True)]
        step = Step([(step.num_rows, 4)], 0, keep, after, torch.device("cpu"))
        self.pages.allocate(len(num_new))
        self.bases.refit(step, self.pages)
        return k, maps

    def _change(self, step, agreed):
        if step.fresh:
            self.bases.rows.start(step.num_rows)
        else:
            self.bases.rows.change(RowChange.of(agreed, [], [], CPU))


def tail_share(x, basis):
    """Share of x [n, 16] that the basis [16, 8] leaves, beside the least possible."""
    least = torch.linalg.svdvals(x)[8:].square().sum() / x.square().sum()
    return ((x - x @ basis @ basis.mT).square().sum() / x.square().sum()), least


def test_the_first_forward_is_fitted_before_it_is_stored():
    k, maps = Run().forward([4, 3], [-1, -1], [0, 0], seed=0)
    for row, tokens in ((0, 4), (1, 3)):
        for head in range(2):
            found, _ = tail_share(k[row, :tokens, head], maps.k[row, head])
            assert found < 1e-6, "four tokens fit into rank 8"


def test_bases_are_fitted_to_all_tokens_when_a_request_has_doubled_and_then_no_more():
    run = Run(fit_tokens=16)
    tokens = [run.forward([4], [-1], [0], seed=0)[0]]
    for at in range(4, 24, 4):
        tokens.append(run.forward([4], [0], [at], seed=at)[0])
    assert run.bases.fitted_at.values == [16] and run.bases.sums is None
    x = torch.cat(tokens[:4], 1)[0, :, 0]
    found, least = tail_share(x, run.bases.bases[0][0][0, 0])
    assert abs(found - least) < 1e-5 and least > 0.01
    settled = run.bases.bases[0][0].clone()
    run.forward([4], [0], [24], seed=9)
    assert torch.equal(settled, run.bases.bases[0][0])
    assert run.bases.nbytes == 2 * 2 * 16 * 8 * 4


def test_rows_follow_forks_and_new_requests_start_anew():
    run = Run()
    run.forward([4, 4], [-1, -1], [0, 0], seed=0)
    old = run.bases.bases[0][0].clone()
    run.forward([4, 4, 4], [1, 1, -1], [4, 4, 0], seed=1)
    assert run.bases.fitted_at.values == [NEVER, NEVER, 4], "forked rows share pages and keep their basis"
    found = run.bases.bases[0][0]
    assert torch.equal(found[0], old[1]) and torch.equal(found[1], old[1]) and not torch.equal(found[2], old[0])


def test_keys_that_are_not_finite_leave_other_requests_alone():
    run = Run()
    step = local([4, 4], [-1, -1], [0, 0])
    run.bases.begin(step)
    k = torch.randn(2, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    clean = k.clone()
    k[0, 1], k[0, 2] = torch.nan, torch.inf
    assert bool(run.bases.maps(0, k, k).k.isfinite().all())
    other = Run()
    other.bases.begin(step)
    assert torch.equal(run.bases.bases[0][0][1], other.bases.maps(0, clean, clean).k[1])


@pytest.mark.parametrize("window", [{}, {"raw_recent_tokens": 5}], ids=["one pool", "two pools"])
def test_a_rotation_turns_the_coefficients_and_nothing_else(window):
    """Through changes of the bases; with all directions attention is exact, which Driver checks."""
    kept = []
    for rotate in ("none", "hadamard"):
        compression = svd()["compression"] | {"rotate": rotate} | window
        driver = Driver([layer(3, dim=16)], codec="svd", compression=compression)
        driver.tolerance = 1e-5
        driver.prefill([20, 9])
        for mask in (ragged([21, 12]), *[ragged([1, 1])] * 4):
            driver.forward(mask)
        assert driver.probe.fitted_at == [41, 21]
        kept.append([driver.probe.pools(0)[-1].entries(row, 0)[1:] for row in range(2)])
    for plain, rotated in zip(*kept, strict=True):
        for x, y, by in zip(plain, rotated, driver.probe.rotations(0), strict=True):
            assert len(x) > 10 and torch.allclose(torch.einsum("nhr,hrs->nhs", x, by), y, atol=1e-4)
            assert (by - torch.eye(16)).abs().max() > 0.1
