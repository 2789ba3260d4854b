"""pack, unpack: bytes where they belong, padding that says so, and the buffers of pikv_ds/exchange/wire.py to the byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds import ops
from pikv_ds.exchange.wire import HEADER, Layout
from pikv_ds.ops import library
from pikv_ds.ops.build import load

SHAPES = [((3, 5), torch.bfloat16), ((2,), torch.float32), ((), torch.int32), ((0,), torch.float16), ((7,), torch.uint8), ((), torch.int64)]
ALL = pytest.mark.parametrize("which", ["torch", "cpu", "emu"])


def _op(which, name):
    if which == "torch":
        return library.REFERENCE[name]
    if which == "emu":
        load.define_emu()
    return getattr(torch.ops.pikv_emu if which == "emu" else torch.ops.pikv, name)


def _fields(rows, seed=0):
    """Any bit pattern, NaNs with payload among them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape, dtype in SHAPES:
        count = rows * torch.Size(shape).numel() * dtype.itemsize
        made.append(torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(rows, *shape))
    return made


def _bits(x):
    return x.contiguous().view(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)


@settings(max_examples=60)
@given(st.integers(0, 9), st.integers(0, 12), st.booleans(), st.integers(0, 2**32))
def test_every_row_finds_its_place(num_rows, packed, indexed, seed):
    """Compiled against the reference, and against the fields themselves."""
    generator = torch.Generator().manual_seed(seed)
    fields = _fields(num_rows, seed)
    index = torch.randint(-1, num_rows, (packed,), generator=generator).int() if indexed else None
    offsets, stride = ops.record_layout(fields)
    found = {}
    for which in ("torch", "cpu", "emu"):
        buffer = torch.full((packed, stride), 0xAB, dtype=torch.uint8)
        _op(which, "pack")(buffer, fields, index, offsets, [stride] * len(fields), [packed] * len(fields))
        found[which] = buffer
    assert torch.equal(found["torch"], found["cpu"]) and torch.equal(found["torch"], found["emu"])
    for field, offset in zip(fields, offsets, strict=True):
        width = field.shape[1:].numel() * field.element_size()
        for r in range(packed):
            source = int(index[r]) if indexed else r if r < num_rows else -1
            expected = field[source] if source >= 0 else torch.full(field.shape[1:], -1).to(field.dtype)
            assert torch.equal(found["cpu"][r, offset : offset + width], _bits(expected)), f"row {r} of {field.dtype}"


@ALL
def test_unpack_undoes_pack(which):
    fields = _fields(6)
    offsets, stride = ops.record_layout(fields)
    order = torch.tensor([4, 0, 5, 2], dtype=torch.int32)
    buffer = torch.zeros(4 * stride, dtype=torch.uint8)
    _op(which, "pack")(buffer, fields, order, offsets, [stride] * len(fields), [4] * len(fields))
    back = [torch.zeros_like(field) for field in fields]
    _op(which, "unpack")(buffer, back, order, offsets, [stride] * len(fields))
    for field, found in zip(fields, back, strict=True):
        for row in range(6):
            expected = field[row] if row in order else torch.zeros_like(field[row])
            assert torch.equal(_bits(found[row]), _bits(expected))
    plain = [torch.zeros_like(field[:4]) for field in fields]
    _op(which, "unpack")(buffer, plain, None, offsets, [stride] * len(fields))
    dropped = [torch.zeros_like(field) for field in fields]
    _op(which, "unpack")(buffer, dropped, torch.tensor([-1, 3, -1, -1]), offsets, [stride] * len(fields))
    for field, found, one in zip(fields, plain, dropped, strict=True):
        assert torch.equal(_bits(found), _bits(field[order.long()]))
        assert torch.equal(_bits(one[3]), _bits(field[0])) and not _bits(one[:3]).any()


@ALL
@pytest.mark.parametrize("tokens", [5, 3, 0])
def test_the_buffers_of_the_exchange_to_the_byte(which, tokens):
    """One call makes what Layout.pack makes: header, a section per field, -1 behind the tokens of a rank that has fewer."""
    described = [("positions", (5,), torch.int32), ("q", (5, 3, 7), torch.bfloat16), ("k", (5, 1, 3), torch.float32),
                 ("ids", (5,), torch.int32)]  # fmt: skip
    layout = Layout(described)
    values = {name: torch.randn(tokens, *shape[1:]).mul(9).to(dtype) for name, shape, dtype in described}
    header = torch.arange(HEADER, dtype=torch.int32) - 3
    expected = layout.pack(header, values, torch.device("cpu"))
    found = expected.clone()
    for section in layout.sections:
        found[section.start : section.stop] = 0xAB
    fields = [header.view(1, -1), *values.values()]
    offsets = [0, *(section.start for section in layout.sections)]
    strides = [field.shape[1:].numel() * field.element_size() for field in fields]
    _op(which, "pack")(found, fields, None, offsets, strides, [1, 5, 5, 5, 5])
    assert torch.equal(found, expected)


@ALL
def test_partials_without_a_copy_of_their_own(which):
    """[out | lse] as cache/replicated.py concatenates them, from the two tensors."""
    out, lse = torch.randn(6, 4 * 16), torch.randn(6, 4)
    expected = torch.cat([out, lse], 1)
    buffer = torch.zeros(6, 4 * 17 * 4, dtype=torch.uint8)
    _op(which, "pack")(buffer, [out, lse], None, [0, 256], [272, 272], [6, 6])
    assert torch.equal(buffer.view(torch.float32), expected)


BAD = {
    "buffer": (lambda a: a | {"buffer": torch.zeros(40)}, "pack: buffer must be contiguous uint8, got torch.float32"),
    "small": (lambda a: a | {"rows": [5]}, "pack: field 0, 5 rows of 8 bytes from 0, 8 apart, does not fit a buffer of 32 bytes"),
    "overlap": (lambda a: a | {"strides": [4]}, "pack: field 0, 4 rows of 8 bytes from 0, 4 apart, does not fit a buffer of 32 bytes"),
    "count": (lambda a: a | {"rows": [4, 4]}, "pack: 1 fields need as many offsets, strides and rows, got 1, 1 and 2"),
    "strides": (lambda a: a | {"fields": [torch.zeros(4, 4)[:, ::2]]}, "pack: field 0 must be contiguous [rows, ...], got [4, 2]"),
    "dtype": (lambda a: a | {"fields": [torch.zeros(4, 8, dtype=torch.bool)]}, "a field must be float64, float32, bfloat16, float16 or"),
    "index": (lambda a: a | {"index": torch.tensor([0, 1, 4, 0])}, "pack: index names row 4 of field 0, which has 4"),
    "index length": (lambda a: a | {"index": torch.tensor([0])}, "pack: field 0 has 4 rows in the buffer, index has 1"),
}


@ALL
@pytest.mark.parametrize("what", list(BAD))
def test_bad_input(which, what):
    change, message = BAD[what]
    given = change({"buffer": torch.zeros(32, dtype=torch.uint8), "fields": [torch.zeros(4, 2)], "index": None, "offsets": [0],
                    "strides": [8], "rows": [4]})  # fmt: skip
    with pytest.raises(RuntimeError) as error:
        _op(which, "pack")(*given.values())
    assert message in str(error.value)
