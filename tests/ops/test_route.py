"""route_pack, route_unpack, route_merge: dense messages, refusals, and the bits of `merge`. The other messages: tests/ops/matrix.py."""

import pytest
import torch

from pikv_ds import ops
from pikv_ds.ops import library
from pikv_ds.ops.build import load
from tests.ops.route_checks import check_route, check_route_merge

ALL = pytest.mark.parametrize("which", ["torch", "cpu", "emu"])
DENSE = pytest.mark.parametrize("which", ["torch", "cpu"])


def op_of(which: str):
    if which == "emu":
        load.define_emu()
    load.ensure("cpu")
    if which == "torch":
        return library.REFERENCE.__getitem__
    return lambda name: getattr(torch.ops.pikv_emu if which == "emu" else torch.ops.pikv, name)


@DENSE
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("ranks", "tokens"), [(1, 3), (2, 1), (4, 7), (3, 40), (2, 0)])
def test_dense_messages(which, ranks, tokens, share):
    check_route(ranks, tokens, share, True, op_of(which), "cpu")


@DENSE
@pytest.mark.parametrize(("ranks", "tokens", "dim"), [(1, 1, 8), (2, 5, 40), (4, 9, 1), (3, 0, 8)])
def test_merging_dense_rows(which, ranks, tokens, dim):
    check_route_merge(ranks, tokens, dim, True, op_of(which), "cpu")


def test_the_bits_of_merge():
    """Of the compiled one: outputs do not depend on whether a rank was asked that had nothing."""
    load.ensure("cpu")
    need = torch.rand(4, 50) < 0.5
    whole = torch.randn(4, 50, 6, 65)
    whole[~need] = 0
    whole[..., -1][~need] = -torch.inf
    found = ops.route_merge(whole[need], need, order=range(4), dense=True)
    expected = ops.merge(whole[..., :-1], whole[..., -1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_header_that_lies():
    load.ensure("cpu")
    buffer, tokens, counts = (
        torch.zeros(2, 64, dtype=torch.uint8),
        torch.zeros(1, 4, dtype=torch.int32),
        torch.zeros(1, 2, dtype=torch.int32),
    )
    buffer[1, 0] = 3
    for op in (op_of("torch"), op_of("cpu")):
        with pytest.raises(RuntimeError, match="rank 1 has sent 3 rows of 2 tokens"):
            op("route_unpack")(buffer, [], tokens, counts, [], True)


def _pack(**changed):
    given = {"buffer": torch.zeros(2, 64, dtype=torch.uint8), "need": torch.zeros(1, 2, 3, dtype=torch.bool),
             "fields": [torch.zeros(3, 2)], "groups": [0], "own": 0, "dense": False} | changed  # fmt: skip
    return "route_pack", list(given.values())


def _unpack(**changed):
    given = {"buffer": torch.zeros(2, 64, dtype=torch.uint8), "fields": [torch.zeros(6, 2)], "tokens": torch.zeros(1, 6, dtype=torch.int32),
             "counts": torch.zeros(1, 2, dtype=torch.int32), "groups": [0], "dense": False} | changed  # fmt: skip
    return "route_unpack", list(given.values())


def _merge(**changed):
    given = {"partials": torch.zeros(6, 2, 5), "need": torch.zeros(2, 3, dtype=torch.bool), "order": [0, 1], "dense": False} | changed
    return "route_merge", list(given.values())


BAD = {
    "buffer": (_pack(buffer=torch.zeros(2, 64)), "route_pack: buffer must be contiguous uint8 [ranks, bytes], got torch.float32 [2, 64]"),
    "need": (_pack(need=torch.zeros(1, 2, 3)), "route_pack: need must be contiguous torch.bool [groups, ranks, tokens], got torch.float32"),
    "ranks": (_pack(need=torch.zeros(1, 3, 3, dtype=torch.bool)), "need has 1 groups and 3 ranks, buffer has room for 4 and 2"),
    "own": (_pack(own=2), "route_pack: own = 2 of 2 ranks"),
    "count": (_pack(groups=[]), "route_pack: 1 fields need as many groups, got 0"),
    "order": (_pack(fields=[torch.zeros(3), torch.zeros(3)], groups=[0, -1]), "groups must ascend from -1 to 0, got -1 at 1"),
    "rows": (_pack(fields=[torch.zeros(4, 2)]), "route_pack: field 0 has 4 rows, need 3 tokens"),
    "room": (_pack(fields=[torch.zeros(3, 9)]), "route_pack: a message of 3 tokens takes 144 bytes, buffer has 64 for each"),
    "tokens": (
        _unpack(tokens=torch.zeros(1, 5, dtype=torch.int32)),
        "tokens must be contiguous torch.int32 [1, 2 * tokens], got torch.int32",
    ),
    "unpacked rows": (_unpack(fields=[torch.zeros(5, 2)]), "route_unpack: field 0 has 5 rows, tokens 6"),
    "counts": (_unpack(counts=torch.zeros(1, 2)), "route_unpack: counts must be contiguous torch.int32 [groups, ranks], got torch.float32"),
    "partials": (
        _merge(partials=torch.zeros(6, 5)),
        "partials must be contiguous torch.float32 [rows, heads, width + 1], got torch.float32",
    ),
    "ranks twice": (_merge(order=[0, 0]), "route_merge: order must name 2 ranks once, got [0, 0]"),
    "few": (_merge(partials=torch.zeros(5, 2, 5)), "route_merge: need asks for 6 rows, partials have 5"),
}


@ALL
@pytest.mark.parametrize("what", list(BAD))
def test_bad_input(which, what):
    (name, args), message = BAD[what]
    with pytest.raises(RuntimeError) as error:
        op_of(which)(name)(*args)
    assert message in str(error.value)


def test_dense_on_a_device_is_refused():
    with pytest.raises(RuntimeError, match="on a device every token has a place"):
        name, args = _merge(dense=True)
        op_of("emu")(name)(*args)
