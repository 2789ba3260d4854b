"""What stays parked: within the budget, the latest used first, what rows share counted once; and logs of tokens against lists."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_ds.prefix.index import BLOCK
from pikv_ds.prefix.log import TokenLog, Tokens
from pikv_ds.prefix.store import PrefixStore


def rows_of(*sequences: list[int]):
    return [_row(tokens) for tokens in sequences]


def _row(tokens: list[int]):
    log = TokenLog()
    log.begin([Tokens()])
    log.add(torch.tensor([tokens]), None, None)
    log.ran()
    return log.rows()[0]


def generation(store: PrefixStore, *sequences: list[int], prompts: tuple[list[int], ...] = ()) -> list[tuple[int, int]]:
    """One ends with these rows, the next begins with these prompts. Returns what these continue."""
    store.ended(rows_of(*sequences))
    sources = [store.find(prompt) for prompt in prompts]
    store.took(len(prompts), sum(map(len, prompts)), sources)
    store.plan()
    store.settled()
    return sources


def test_a_prompt_finds_the_row_that_begins_like_it_and_leaves_a_token_to_run():
    store = PrefixStore(1000)
    generation(store, list(range(100)))
    assert generation(store, prompts=(list(range(100)),)) == [(0, 99)]
    assert generation(store, prompts=(list(range(60)) + [7] * 50,)) == [(0, 60)]
    assert generation(store, prompts=([7] * 50,)) == [(-1, 0)]
    assert (store.requests, store.hits, store.reused, store.looked_up) == (3, 2, 159, 260)


def test_the_longest_unused_goes_first():
    store = PrefixStore(200)
    a, b, c = ([token] * 90 for token in (1, 2, 3))
    generation(store, a)
    generation(store, b)
    generation(store, c, prompts=(a + [5],))
    assert store.parked_tokens <= 200
    assert generation(store, prompts=(a + [5], c + [5], b + [5])) == [(0, 90), (1, 90), (2, 20)]


def test_a_row_longer_than_the_budget_keeps_its_beginning():
    store = PrefixStore(50)
    generation(store, list(range(100)))
    assert store.parked_tokens == 50 and generation(store, prompts=(list(range(100)),)) == [(0, 50)]


def test_a_row_that_begins_another_is_not_parked_beside_it():
    store = PrefixStore(1000)
    generation(store, [4] * 40, [4] * 80, [4] * 40 + [5] * 40)
    assert [len(held.row.tokens) for held in store.parked] == [80, 80]


def test_what_is_not_known_is_not_parked():
    store = PrefixStore(1000)
    store.ended([None, *rows_of([4] * 40)])
    assert store.plan() == [(1, 40)]


@given(data=st.data())
def test_a_log_replays_what_happened(data):
    """Against lists; rows that share tokens by a fork are counted once, all others apart."""
    rows = data.draw(st.integers(1, 3))
    log, lists, ids = TokenLog(), [[] for _ in range(rows)], iter(range(10**6))
    log.begin([Tokens() for _ in range(rows)])
    for _ in range(data.draw(st.integers(0, 8))):
        what = data.draw(st.sampled_from(["add", "select", "keep"]))
        if what == "add":
            columns = data.draw(st.integers(1, 12))
            tokens = torch.tensor([[next(ids) for _ in range(columns)] for _ in lists])
            real = st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=len(lists), max_size=len(lists))
            mask = data.draw(st.none() | real.map(torch.tensor))
            log.add(tokens, mask, torch.tensor(False))
            real = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask
            lists = [own + tokens[b][real[b]].tolist() for b, own in enumerate(lists)]
        elif what == "select":
            index = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=4))
            log.select(index)
            lists = [list(lists[i]) for i in index]
        else:
            lens = [data.draw(st.integers(0, len(own))) for own in lists]
            log.keep(lens)
            lists = [own[:n] for own, n in zip(lists, lens, strict=True)]
    log.ran()
    log.keep([0] * len(lists))  # waits for a forward
    found = log.rows()
    assert [row.tokens for row in found] == lists
    assert all(row.parts == [] if not row.tokens else row.parts[-1][1] == len(row.tokens) for row in found)
    budget = data.draw(st.integers(0, 80))
    store = PrefixStore(budget)
    store.ended(found)
    planned = store.plan()
    store.settled()
    unique = {token for i, keep in planned for token in lists[i][:keep]}  # every token was drawn once
    assert store.parked_tokens == len(unique) <= budget
    assert all(keep >= BLOCK for _, keep in planned)


def test_a_log_whose_places_are_wrong_is_not_known():
    log = TokenLog()
    log.begin([Tokens()])
    log.add(torch.tensor([[1, 2]]), None, torch.tensor(True))
    assert log.rows() is None
