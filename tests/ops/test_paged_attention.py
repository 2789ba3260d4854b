"""Attention over scattered pages against one query at a time in float64; what is hidden may be NaN without changing a bit."""

import pytest
import torch

from pikv_ds.ops import PageFormat, merge_partials, new_pages, paged_attention, views
from tests.harness.dense import rel_error
from tests.harness.driver import TOLERANCE
from tests.reference_cache import dense_attention

COUNTS = torch.tensor([[5, 0, 9], [0, 0, 0], [3, 6, 1], [0, 1, 32]])  # [R, S]: an empty row, empty shards, full pages, one entry


class Pages:
    """Random entries of R rows in S shards, in pages taken in random order; positions interleave over the shards of a row."""

    def __init__(self, page_size: int, Hkv: int, dims: tuple[int, int], *, counts=COUNTS, latent=False, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(page_size + 10 * Hkv)
        num_pages, width = int((-(-counts // page_size)).sum()), int(counts.max()) // page_size + 2
        free = torch.randperm(num_pages + 3, generator=generator).tolist()
        self.fmt = PageFormat({torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], Hkv, *dims, page_size, latent=latent)
        self.pages = new_pages(self.fmt, num_pages + 3)
        k, v, self.positions = views(self.pages, self.fmt)  # [P, Hkv, page_size, D]
        self.k, self.v = k.transpose(1, 2), v.transpose(1, 2)
        for field in (self.k,) if latent else (self.k, self.v):
            field.copy_(torch.randn(field.shape, generator=generator))
        self.positions.fill_(2**30)
        self.table = torch.full((*counts.shape, width), -1, dtype=torch.int32)
        self.counts, self.rows = counts, []  # rows: (position, page, offset) of every entry
        for row, of_row in enumerate(counts.tolist()):
            order = torch.randperm(sum(of_row), generator=generator).tolist()
            entries = []
            for shard, count in enumerate(of_row):
                mine, order = sorted(order[:count]), order[count:]
                for i, position in enumerate(mine):
                    if i % page_size == 0:
                        self.table[row, shard, i // page_size] = free.pop()
                    page = int(self.table[row, shard, i // page_size])
                    self.positions[page, i % page_size] = position
                    entries.append((position, page, i % page_size))
            self.rows.append(entries)

    def hide(self, value: float) -> None:
        """Write `value` where no entry is."""
        dead = torch.ones(self.positions.shape, dtype=torch.bool)
        for entries in self.rows:
            for _, page, offset in entries:
                dead[page, offset] = False
        self.k[dead] = value
        if self.v.data_ptr() != self.k.data_ptr():
            self.v[dead] = value

    def attend(self, q, scale, **options):
        table, counts = self.table.flatten(0, 1).unsqueeze(1), self.counts.to(torch.int32).reshape(-1, 1)
        return paged_attention(q, self.pages, self.fmt, table, counts, scale=scale, **options)

    def loops(self, q, scale, window=None, at=None):
        R, T, Hq, _ = q.shape
        out, lse = torch.zeros(R, T, Hq, self.v.shape[-1], dtype=torch.float64), torch.full((R, T, Hq), -torch.inf, dtype=torch.float64)
        for row in range(R):
            for t in range(T):
                seen = [(p, o) for position, p, o in self.rows[row] if window is None or position > int(at[row, t]) - window]
                pages, offsets = torch.tensor(seen, dtype=torch.int64).view(-1, 2).unbind(1)
                out[row, t], lse[row, t] = dense_attention(q[row, t], self.k[pages, offsets], self.v[pages, offsets], scale)
        return out, lse


def query(T: int, Hq: int, dim: int, dtype=torch.float32, R: int = len(COUNTS)) -> torch.Tensor:
    return torch.randn(R, T, Hq, dim, generator=torch.Generator().manual_seed(T + Hq)).to(dtype)


def assert_close(got, want):
    (out, lse), (want_out, want_lse) = got, want
    empty = want_lse == -torch.inf
    assert out.dtype == lse.dtype == torch.float32
    assert torch.equal(lse == -torch.inf, empty) and out[empty].eq(0).all()
    assert rel_error(out[~empty], want_out[~empty]) <= TOLERANCE and rel_error(lse[~empty], want_lse[~empty]) <= TOLERANCE


@pytest.mark.parametrize("page_size", [1, 3, 32], ids="page{}".format)
@pytest.mark.parametrize(("Hq", "Hkv"), [(4, 4), (8, 2), (8, 1)], ids=["G1", "G4", "G8"])
@pytest.mark.parametrize("dims", [(16, 16), (16, 8)], ids=["Dk=Dv", "Dk>Dv"])
@pytest.mark.parametrize("T", [1, 4], ids="T{}".format)
def test_equals_loops(T, dims, Hq, Hkv, page_size):
    pages, q = Pages(page_size, Hkv, dims), query(T, Hq, dims[0])
    pages.hide(torch.nan)
    assert_close(pages.attend(q, 0.3), pages.loops(q, 0.3))


@pytest.mark.parametrize("page_size", [1, 3, 32], ids="page{}".format)
@pytest.mark.parametrize("latent", [False, True], ids=["kv", "latent"])
@pytest.mark.parametrize("window", [1, 2, 7, 100], ids="W{}".format)
def test_windows_go_by_stored_positions(window, latent, page_size):
    pages, q = Pages(page_size, 1 if latent else 2, (16, 8) if latent else (8, 8), latent=latent), query(3, 4, 16 if latent else 8)
    pages.hide(torch.nan)
    at = COUNTS.sum(1, keepdim=True) + torch.tensor([0, 1, 5])  # queries behind the end: with W = 1 they see nothing here
    want = pages.loops(q, 0.3, window, at)
    assert_close(pages.attend(q, 0.3, window=window, q_positions=at), want)
    assert bool((want[1] == -torch.inf).all()) == (window == 1)


@pytest.mark.parametrize("page_size", [1, 3, 32], ids="page{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_latent_values_are_columns_of_the_keys(dtype, page_size):
    pages, q = Pages(page_size, 1, (16, 8), latent=True, dtype=dtype), query(2, 4, 16, dtype)
    pages.hide(torch.nan)
    assert_close(pages.attend(q, 0.3), pages.loops(q, 0.3))


@pytest.mark.parametrize("latent", [False, True], ids=["kv", "latent"])
@pytest.mark.parametrize("window", [None, 4], ids=["full", "W4"])
@pytest.mark.parametrize("page_size", [1, 3, 32], ids="page{}".format)
def test_hidden_slots_change_no_bit(page_size, window, latent):
    pages, q = Pages(page_size, 1 if latent else 2, (16, 8) if latent else (8, 8), latent=latent), query(2, 4, 16 if latent else 8)
    options = {} if window is None else {"window": window, "q_positions": COUNTS.sum(1, keepdim=True) + torch.arange(2)}
    results = []
    for hidden in (0.0, torch.nan, torch.inf, -1e30):
        pages.hide(hidden)
        results.append(pages.attend(q, 0.3, **options))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_the_pages_themselves_are_not_written():
    pages, q = Pages(3, 2, (8, 8)), query(1, 4, 8)
    pages.hide(torch.nan)
    k, v = pages.k.clone(), pages.v.clone()
    pages.attend(q, 0.3)
    assert torch.equal(k.nan_to_num(9), pages.k.nan_to_num(9)) and torch.equal(v.nan_to_num(9), pages.v.nan_to_num(9))


def test_shards_read_apart_merge_to_the_whole():
    pages, q = Pages(3, 2, (8, 8)), query(2, 4, 8)
    pages.hide(torch.nan)
    counts = COUNTS.to(torch.int32)
    parts = [paged_attention(q, pages.pages, pages.fmt, pages.table[:, s : s + 1], counts[:, s : s + 1], scale=0.3) for s in range(3)]
    assert_close(merge_partials(*(torch.stack(side) for side in zip(*parts, strict=True))), pages.loops(q, 0.3))
