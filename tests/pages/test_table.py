"""A page table alone against lists: what is counted of pages goes where their ids go, and parked rows come back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.pages.table import PageTable

PAGE_SIZE = 3


def drawn(draw, rows: int, tables: int, *, counted: bool) -> tuple[PageTable, list[list[int]]]:
    """A table of rows and tables whose pages are numbered in turns, and its lists [rows * tables]; counted: 10 times 1 + id."""
    counts = torch.tensor(draw(st.lists(st.integers(0, 8), min_size=rows * tables, max_size=rows * tables)), dtype=torch.int32)
    table, lists, page = PageTable(counts.view(rows, tables)), [], 0
    table.widen(max(-(-int(n) // PAGE_SIZE) for n in counts))
    for row in table.ids.view(rows * tables, -1).split(1):
        here = -(-int(counts[len(lists)]) // PAGE_SIZE)
        row[0, :here] = torch.arange(page, page + here, dtype=torch.int32)
        lists.append(list(range(page, page + here)))
        page += here
    if counted:
        table.counted["hits"] = torch.where(table.ids >= 0, 10 * (table.ids + 1), 0)
    return table, lists


def check(table: PageTable, lists: list[list[int]]) -> None:
    rows = table.ids.flatten(0, 1)
    assert [[page for page in row.tolist() if page >= 0] for row in rows] == lists
    assert all(row[: len(own)].tolist() == own and (row[len(own) :] == -1).all() for row, own in zip(rows, lists, strict=True))
    for x in table.counted.values():
        assert torch.equal(x, torch.where(table.ids >= 0, 10 * (table.ids + 1), 0)) and x.is_contiguous()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_pages_that_go_and_rows_that_fork_take_what_is_counted_along(data):
    rows, tables = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    table, lists = drawn(data.draw, rows, tables, counted=True)
    check(table, lists)
    gone = torch.tensor(data.draw(st.lists(st.booleans(), min_size=table.ids.numel(), max_size=table.ids.numel()))).view_as(table.ids)
    gone &= table.ids >= 0
    taken_out = set(table.ids[gone].tolist())
    table.close_up(gone)
    lists = [[page for page in own if page not in taken_out] for own in lists]
    check(table, lists)
    parent = data.draw(st.lists(st.integers(-1, rows - 1), min_size=1, max_size=4))
    kept = [[data.draw(st.integers(0, PAGE_SIZE * len(lists[p * tables + t]))) if p >= 0 else 0 for t in range(tables)] for p in parent]
    table.fork(torch.tensor(parent), torch.tensor(kept, dtype=torch.int32), PAGE_SIZE)
    lists = [lists[p * tables + t][: -(-kept[i][t] // PAGE_SIZE)] if p >= 0 else [] for i, p in enumerate(parent) for t in range(tables)]
    check(table, lists)
    table.widen(table.width + data.draw(st.integers(-1, 3)))
    check(table, lists)
    assert table.counts.tolist() == kept


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_parked_rows_come_back_as_they_were(data):
    rows, tables = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    table, lists = drawn(data.draw, rows, tables, counted=False)
    counts, active = table.counts, data.draw(st.integers(0, rows))
    most = max((len(own) for own in lists[active * tables :]), default=0)
    table.split(counts[:active], most)
    assert table.num_rows == active and table.parked.shape == (rows - active, tables, most)
    check(table, lists[: active * tables])
    renamed = torch.arange(max(1, sum(map(len, lists))), dtype=torch.int32).flip(0)
    table.renumber(renamed)
    lists = [[int(renamed[page]) for page in own] for own in lists]
    table.widen(data.draw(st.integers(0, 6)))
    table.join(counts)
    check(table, lists)
    assert table.num_rows == rows and not len(table.parked)


def test_the_last_column_stays_unused():
    table = PageTable(torch.zeros(1, 1, dtype=torch.int32))
    for pages in (0, 1, 1, 5, 40, 41):
        before = table.width
        table.widen(pages)
        assert table.width == (before if before > pages else pages + 1 + pages // 32)
