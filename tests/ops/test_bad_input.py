"""Each wrong input gets its message, the same from the reference and from the compiled version."""

import pytest
import torch

from pikv_ds.ops import library
from pikv_ds.ops.build import load
from pikv_ds.ops.format.formats import PageFormat
from tests.ops.cases import make_case

ALL = pytest.mark.parametrize("which", ["torch", "cpu", "emu"])


def _op(which, name):
    if which == "torch":
        return library.REFERENCE[name]
    if which == "emu":
        load.define_emu()
    return getattr(torch.ops.pikv_emu if which == "emu" else torch.ops.pikv, name)


def _refused(which, name, args, message):
    """The op refuses, with this message; a compiled one with all the words of the reference."""
    said = {}
    for implementation in {which, "torch"}:
        with pytest.raises(RuntimeError) as error:
            _op(implementation, name)(*args)
        said[implementation] = str(error.value).splitlines()[0].partition("pikv: ")[2]  # torch puts the line of the C++ file before it
    assert message in said[which]
    assert said[which] == said["torch"]


def _decode_args(case, **change):
    given = {"q": case.q, "pages": case.pages, "block_table": case.block_table, "seqlens": case.seqlens, "q_positions": None,
             "page_list": None, "tail": case.extra.get("tail"), "tail_rows": case.extra.get("tail_rows"), "window": 0} | change  # fmt: skip
    window = given.pop("window")
    return (*given.values(), *library.layout(case.fmt), 1.0, window, False, 0)


DECODE = {
    "head_dim": (lambda c: {"q": c.q[..., :32].contiguous()}, "q has head_dim 32, the pages have 64"),
    "heads": (lambda c: {"q": c.q[:, :7].contiguous()}, "7 query heads are not a multiple of 2 kv heads"),
    "dtype": (lambda c: {"q": c.q.double()}, "q must be float32, bfloat16 or float16, got torch.float64"),
    "strides": (lambda c: {"q": torch.cat([c.q, c.q], -1)[..., :64]}, "q must be contiguous"),
    "pages": (lambda c: {"pages": c.pages[:, :-64].contiguous()}, "pages must be uint8 [num_pages, "),
    "page strides": (lambda c: {"pages": torch.cat([c.pages, c.pages])[::2]}, "pages must be contiguous"),
    "table id": (lambda c: {"block_table": c.block_table.clone().fill_(99)}, "block_table names page 99, the store has"),
    "negative id": (lambda c: {"block_table": c.block_table.clone().fill_(-1)}, "block_table names page -1, the store has"),
    "table dtype": (lambda c: {"block_table": c.block_table.float()}, "block_table must be int32 or int64, got torch.float32"),
    "table heads": (lambda c: {"block_table": c.block_table.repeat(1, 3, 1)}, "block_table has 3 heads, the pages have 2"),
    "seqlens": (lambda c: {"seqlens": c.seqlens + 1000}, "the block table has room for"),
    "seqlens shape": (lambda c: {"seqlens": c.seqlens.view(-1)}, "seqlens must be [2, 1 or 2], got [2]"),
    "requests": (lambda c: {"q": c.q.repeat(2, 1, 1)[:3]}, "block_table has 2 rows, which is not a multiple of the 3 requests of q"),
    "list": (lambda c: {"page_list": torch.tensor([[[9]], [[0]]])}, "page_list names column 9 of a block table with"),
    "list shape": (lambda c: {"page_list": torch.tensor([[[0]]])}, "page_list must be [2, 1 or 2, num_listed], got [1, 1, 1]"),
    "window": (lambda c: {"window": 5}, "a window needs q_positions"),
    "tail": (lambda c: {"tail": torch.zeros(2)}, "bf16 pages have no tail"),
}


@ALL
@pytest.mark.parametrize("what", list(DECODE))
def test_decode(which, what):
    case = make_case(lens=(20, 5))
    change, message = DECODE[what]
    _refused(which, "decode", _decode_args(case, **change(case)), message)


@ALL
def test_grouped_formats_need_their_tail(which):
    case = make_case("int8", lens=(20,))
    tail, rows = case.extra["tail"], case.extra["tail_rows"]
    wrong = {
        "int8 pages need tail and tail_rows": {"tail": None},
        "tail must be [rows, 2, 64, 64], got [1, 2, 64, 32]": {"tail": tail[..., :32].contiguous()},
        "tail must be float32, bfloat16 or float16, got torch.float64": {"tail": tail.double()},
        "tail_rows must be [1] or [1, 1 or 2], got [2]": {"tail_rows": rows.repeat(2)},
        "tail row 1 is beyond the 1 rows of the tail": {"tail_rows": rows + 1},
    }
    for message, change in wrong.items():
        _refused(which, "decode", _decode_args(case, **change), message)


PREFILL = {
    "queries": (lambda a: a | {"q": a["q"][:, 0].contiguous()}, "q must be [R, T, num_q_heads, head_dim], got [1, 8, 64]"),
    "positions": (lambda a: a | {"q_positions": torch.zeros(1, 2, dtype=torch.int32)}, "q_positions must be [1, 3], got [1, 2]"),
    "head_dim": (lambda a: a | {"q": a["q"][..., :32].contiguous()}, "q has head_dim 32, the pages have 64"),
    "strides": (lambda a: a | {"q": torch.cat([a["q"]] * 2, -1)[..., :64]}, "q must be contiguous"),
    "table id": (lambda a: a | {"block_table": a["block_table"].clone().fill_(99)}, "block_table names page 99, the store has"),
    "seqlens": (lambda a: a | {"seqlens": a["seqlens"] + 1000}, "the block table has room for"),
}


@ALL
@pytest.mark.parametrize("what", list(PREFILL))
def test_prefill_cached(which, what):
    case = make_case(lens=(20,))
    change, message = PREFILL[what]
    given = change({"q": torch.zeros(1, 3, *case.q.shape[1:]), "pages": case.pages, "block_table": case.block_table,
                    "seqlens": case.seqlens, "q_positions": torch.zeros(1, 3, dtype=torch.int32)})  # fmt: skip
    _refused(which, "prefill_cached", (*given.values(), None, None, *library.layout(case.fmt), 1.0, 0, True, 0), message)


APPEND = {
    "slot": ({"slot_mapping": torch.tensor([0, 64, -1])}, "slot 64 is beyond the 64 slots of the store"),
    "dtype": ({"v": torch.zeros(3, 2, 32, dtype=torch.bfloat16)}, "k is torch.float32, v is torch.bfloat16"),
    "k": ({"k": torch.zeros(3, 2, 40)}, "k must be [3, 2, 32], got [3, 2, 40]"),
    "v": ({"v": torch.zeros(3, 1, 32)}, "v must be [3, 2, 32], got [3, 1, 32]"),
    "strides": ({"k": torch.zeros(3, 2, 64)[..., ::2]}, "k must be contiguous"),
    "positions": ({"positions": torch.zeros(2, dtype=torch.int32)}, "positions must be [3], got [2]"),
    "row": ({"tail_rows": torch.tensor([0, 1, 0])}, "tail row 1 is beyond the 1 rows of the tail"),
}


@ALL
@pytest.mark.parametrize("what", list(APPEND))
def test_append(which, what):
    fmt = PageFormat("int4", 2, 32, 32, 64)
    change, message = APPEND[what]
    given = {"pages": torch.zeros(1, fmt.record_bytes, dtype=torch.uint8), "tail": torch.zeros(1, 2, 64, 32), "k": torch.zeros(3, 2, 32),
             "v": torch.zeros(3, 2, 32), "positions": torch.zeros(3, dtype=torch.int32), "slot_mapping": torch.tensor([0, 1, -1]),
             "tail_rows": torch.zeros(3, dtype=torch.int32)} | change  # fmt: skip
    _refused(which, "append", (*given.values(), *library.layout(fmt)), message)


@ALL
def test_merge_and_migrate(which):
    out, lse = torch.zeros(2, 3, 8), torch.zeros(2, 3)
    _refused(which, "merge", (out.double(), lse), "merge needs float32 partials, got torch.float64")
    _refused(which, "merge", (out, torch.zeros(2, 4)), "out [2, 3, 8] and lse [2, 4] differ in a leading dimension")
    _refused(which, "merge", (torch.zeros(2, 3, 16)[..., ::2], lse), "out and lse must be contiguous")
    records, ids, beyond = torch.zeros(2, 64, dtype=torch.uint8), torch.tensor([1]), torch.tensor([2])
    _refused(which, "migrate", (records, records.clone(), beyond, ids), "target_ids has page 2, the store has 2")
    _refused(which, "migrate", (records, records.clone(), ids, beyond), "source_ids has page 2, the store has 2")
    _refused(which, "migrate", (records, records[:, :32].contiguous(), ids, ids), "target has records of 64 bytes, source of 32")
    _refused(which, "migrate", (records, records.float(), ids, ids), "source must be contiguous uint8 [num_pages, record_bytes]")
    _refused(which, "migrate", (records, records.clone(), ids, torch.tensor([0, 1])), "target_ids [1] and source_ids [2] differ")


BOUNDS = {
    "shape": ({"bounds": torch.zeros(1, 2, 32)}, "bounds must be [1, 2, 2, 32], got [1, 2, 32]"),
    "dtype": (
        {"bounds": torch.zeros(1, 2, 2, 32, dtype=torch.float64)},
        "bounds must be float32, bfloat16, float16 or int8, got torch.float64",
    ),
    "no room for the scale": ({"bounds": torch.zeros(1, 2, 2, 32, dtype=torch.int8)}, "bounds must be [1, 2, 2, 34], got [1, 2, 2, 32]"),
    "slot": ({"slot_mapping": torch.tensor([0, 64, -1])}, "slot 64 is beyond the 64 slots of the store"),
    "row": ({"tail_rows": torch.tensor([0, 1, 0])}, "tail row 1 is beyond the 1 rows of the tail"),
    "tail": ({"tail": None}, "int4 pages need tail and tail_rows"),
}


@ALL
@pytest.mark.parametrize("what", list(BOUNDS))
def test_page_bounds(which, what):
    fmt = PageFormat("int4", 2, 32, 32, 64)
    change, message = BOUNDS[what]
    given = {"bounds": torch.zeros(1, 2, 2, 32), "pages": torch.zeros(1, fmt.record_bytes, dtype=torch.uint8),
             "slot_mapping": torch.tensor([0, 1, -1]), "tail": torch.zeros(1, 2, 64, 32),
             "tail_rows": torch.zeros(3, dtype=torch.int32)} | change  # fmt: skip
    _refused(which, "page_bounds", (*given.values(), *library.layout(fmt)), message)


SCORE = {
    "head_dim": ({"q": torch.zeros(2, 4, 16)}, "q has head_dim 16, the bounds have 32"),
    "head_dim, int8": ({"bounds": torch.zeros(3, 2, 2, 32, dtype=torch.int8)}, "q has head_dim 32, the bounds have 30"),
    "dtype": (
        {"bounds": torch.zeros(3, 2, 2, 32, dtype=torch.uint8)},
        "bounds must be float32, bfloat16, float16 or int8, got torch.uint8",
    ),
    "query dtype": ({"q": torch.zeros(2, 4, 32, dtype=torch.int8)}, "q must be float32, bfloat16 or float16, got torch.int8"),
    "heads": ({"q": torch.zeros(2, 3, 32)}, "3 query heads are not a multiple of 2 kv heads"),
    "table heads": ({"block_table": torch.zeros(2, 3, 4, dtype=torch.int32)}, "block_table has 3 heads, the bounds have 2"),
    "table id": ({"block_table": torch.full((2, 1, 4), 5)}, "block_table names page 5, the store has 3"),
    "seqlens": ({"seqlens": torch.full((2, 1), 65)}, "seqlens has 65, the block table has room for 64 entries"),
    "seqlens shape": ({"seqlens": torch.zeros(2, dtype=torch.int32)}, "seqlens must be [2, 1 or 2], got [2]"),
    "strides": ({"q": torch.zeros(2, 4, 64)[..., ::2]}, "q must be contiguous"),
    "width": ({"width": torch.zeros(2, 2, 32)}, "width must have the shape of q, [2, 4, 32], got [2, 2, 32]"),
    "width dtype": ({"width": torch.zeros(2, 4, 32, dtype=torch.bfloat16)}, "width must have the dtype of q"),
}


@ALL
@pytest.mark.parametrize("what", list(SCORE))
def test_page_score(which, what):
    change, message = SCORE[what]
    given = {"q": torch.zeros(2, 4, 32), "bounds": torch.zeros(3, 2, 2, 32), "block_table": torch.zeros(2, 1, 4, dtype=torch.int32),
             "seqlens": torch.ones(2, 1, dtype=torch.int32), "width": None} | change  # fmt: skip
    _refused(which, "page_score", (*given.values(), 16, 1.0), message)


@ALL
def test_checksum(which):
    _refused(
        which, "checksum", (torch.zeros(12, dtype=torch.uint8),), "checksum needs a contiguous tensor of whole 8-byte words, got 12 bytes"
    )
