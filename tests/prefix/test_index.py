"""The longest common beginning, against comparing with every sequence."""

from hypothesis import given
from hypothesis import strategies as st

from pikv_ds.prefix import index as under_test
from pikv_ds.prefix.index import BLOCK, PrefixIndex


def brute(held: dict[int, list[int]], tokens: list[int]) -> tuple[int, int] | None:
    """(number, length), the latest number of several; nothing below a block."""
    best = None
    for number, own in held.items():
        length = 0
        while length < min(len(own), len(tokens)) and own[length] == tokens[length]:
            length += 1
        if length >= BLOCK and (best is None or (length, number) > (best[1], best[0])):
            best = number, length
    return best


@st.composite
def sequences(draw) -> list[int]:
    """Few different beginnings, so that many are common."""
    parts = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2 * BLOCK)), max_size=5))
    return [token for token, n in parts for _ in range(n)]


@given(steps=st.lists(st.tuples(st.sampled_from(["hold", "forget", "match"]), st.integers(0, 4), sequences()), max_size=25))
def test_finds_what_comparing_finds(steps):
    index, held = PrefixIndex(), {}
    for what, number, tokens in steps:
        if what == "hold":
            index.hold(number, tokens)
            held[number] = tokens
        elif what == "forget":
            index.forget(number)
            held.pop(number, None)
        else:
            found = index.match(tokens)
            assert (found and tuple(found)) == brute(held, tokens)
        assert len(index) == len(held)


def test_ids_decide_where_hashes_are_equal(monkeypatch):
    """Any two beginnings of as many blocks have one hash: what is found has the ids all the same."""
    monkeypatch.setattr(under_test, "_keys", lambda tokens: iter(range(1, len(tokens) // BLOCK + 1)))
    index = PrefixIndex()
    held = {1: [1] * 40, 2: [2] * 64, 3: [2] * 20 + [3] * 44}
    for number, tokens in held.items():
        index.hold(number, tokens)
    for tokens in ([2] * 50, [2] * 20 + [3] * 9, [1] * 64, [4] * 64, [1] * 20 + [2] * 44):
        found = index.match(tokens)
        assert (found and tuple(found)) == brute(held, tokens)


def test_nothing_is_left_of_what_was_forgotten():
    index = PrefixIndex()
    index.hold(1, [5] * 64)
    index.hold(2, [5] * 32)
    index.forget(1)
    index.forget(2)
    assert not index._blocks and not index._held and index.match([5] * 64) is None
