"""One tensor of a call on another device: every op refuses it, in every implementation, before it reads anything."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pikv_ds import ops
from pikv_ds.ops import library
from pikv_ds.ops.build import load

FMT = ops.PageFormat("int8", 2, 32, 32, 64)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def legal() -> dict[str, tuple]:
    """Arguments that every implementation takes, with nothing left out."""
    pages, tail, rows = ops.new_pages(FMT, 2), torch.zeros(1, 2, 64, 32), ints(1)
    q, k, bounds = torch.zeros(1, 4, 32), torch.zeros(1, 2, 32), torch.zeros(2, 2, 2, 32)
    table, lens, layout = ints(1, 1, 2), ints(1, 1), FMT.layout
    buffer, fields = torch.zeros(2, 8, dtype=torch.uint8), [torch.zeros(2, 1), torch.zeros(2, 1)]
    longs = torch.zeros(1, dtype=torch.int64)
    return {
        "decode": (q, pages, table, lens, ints(1), ints(1, 1, 1), tail, rows, *layout, 1.0, 4, False, 0),
        "prefill_cached": (q[None], pages, table, lens, ints(1, 1), tail, rows, *layout, 1.0, 0, True, 0),
        "append": (pages, tail, k, k.clone(), ints(1), ints(1), rows, *layout),
        "merge": (torch.zeros(2, 3, 8), torch.zeros(2, 3)),
        "migrate": (pages, pages.clone(), ints(1), ints(1)),
        "page_bounds": (bounds, pages, ints(1), tail, rows, *layout),
        "page_score": (q, bounds, table, lens, q.clone(), 64, 1.0),
        "pack": (buffer, fields, ints(2), [0, 4], [8, 8], [2, 2]),
        "unpack": (buffer, fields, ints(2), [0, 4], [8, 8]),
        "assign_slots": (ints(1, 1), ints(1, 1, 3), ints(3), torch.tensor(2), ints(3), longs, longs.clone(), longs == 0, 64, True, True),
        "checksum": (torch.zeros(16, dtype=torch.uint8),),
        "route_pack": (torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(1, 2, 2, dtype=torch.bool), fields, [0, 0], 0, False),
        "route_unpack": (
            torch.zeros(2, 64, dtype=torch.uint8),
            [torch.zeros(4, 1), torch.zeros(4, 1)],
            ints(1, 4),
            ints(1, 2),
            [0, 0],
            False,
        ),
        "route_merge": (torch.zeros(4, 1, 3), torch.zeros(2, 2, dtype=torch.bool), [0, 1], False),
    }


def implementation(which: str, name: str):
    """The kernel itself: a call with a meta tensor would not be sent to it."""
    if which == "reference":
        return library.REFERENCE[name]
    if which == "nvrtc":
        return load.nvrtc_ops()[name]
    if which == "emu":
        load.define_emu()
    load.ensure("cpu")
    op = getattr(torch.ops.pikv_emu if which == "emu" else torch.ops.pikv, name).default
    return lambda *args: op.redispatch(CPU, *args)


def tensors_of(args) -> list[int]:
    return [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) or (isinstance(x, list) and isinstance(x[0], torch.Tensor))]


def moved(x, device: str):
    """A list loses its last tensor only."""
    return [*x[:-1], x[-1].to(device)] if isinstance(x, list) else x.to(device)


def schema_names(name: str) -> list[str]:
    return [x.name for x in getattr(torch.ops.pikv, name).default._schema.arguments]


def test_every_op_is_here():
    assert list(legal()) == list(library.SCHEMAS)
    for name, args in legal().items():
        given = [x.name for x in getattr(torch.ops.pikv, name).default._schema.arguments if "Tensor" in str(x.type)]
        assert [schema_names(name)[i] for i in tensors_of(args)] == given, "an optional tensor was left out"


@pytest.mark.parametrize("which", ["reference", "cpu", "emu", "nvrtc"])
@pytest.mark.parametrize("name", list(library.SCHEMAS))
def test_another_device_is_refused(which, name):
    op, names = implementation(which, name), schema_names(name)
    if which != "nvrtc":
        op(*legal()[name])  # all on one: taken
    first, *others = tensors_of(legal()[name])
    for i in others:
        args = list(legal()[name])
        args[i] = moved(args[i], "meta")
        with pytest.raises(RuntimeError) as error:
            op(*args)
        assert f"pikv: {name}: {names[i]} is on meta, {names[first]} on cpu; all tensors of a call must be on one device" in str(
            error.value
        )
    if others:
        args = list(legal()[name])
        args[first] = moved(args[first], "meta")
        with pytest.raises(RuntimeError, match=rf"{name}: {names[others[0]]} is on cpu, {names[first]} on meta; all tensors"):
            op(*args)


@pytest.mark.parametrize("name", [name for name in library.SCHEMAS if name != "checksum"])
def test_two_gpus_are_told_apart_where_shapes_are_worked_out(name):
    """Fake tensors stand for those of a device that is not here, as under torch.compile."""
    given = legal()[name]
    with FakeTensorMode(allow_non_fake_inputs=True):
        args = [x if i not in tensors_of(given) else [y.to("cuda:0") for y in x] if isinstance(x, list) else x.to("cuda:0")
                for i, x in enumerate(given)]  # fmt: skip
        getattr(torch.ops.pikv, name)(*args)
        last = tensors_of(args)[-1]
        args[last] = moved(args[last], "cuda:1")
        with pytest.raises(RuntimeError, match=rf"{name}: {schema_names(name)[last]} is on cuda:1, \w+ on cuda:0"):
            getattr(torch.ops.pikv, name)(*args)


def test_the_first_use_of_an_op_is_refused_too():
    """Before any compiled version is loaded: the reference below it looks as well."""
    out, lse = legal()["merge"]
    with pytest.raises(RuntimeError, match="merge: lse is on meta, out on cpu"):
        torch.ops.pikv.merge(out, lse.to("meta"))
