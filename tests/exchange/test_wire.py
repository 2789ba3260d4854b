"""Buffers that cross ranks: every value arrives with its bits, every section is aligned, headers are readable."""

import pytest
import torch

from pikv_ds.exchange.wire import ALIGN, HEADER, Layout, headers_of

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

CPU = torch.device("cpu")
FIELDS = [
    ("positions", (5,), torch.int32),
    ("q", (5, 3, 7), torch.bfloat16),
    ("k", (5, 1, 3), torch.float32),
    ("v", (5, 1, 0), torch.float32),
    ("ids", (5,), torch.int32),
    ("flags", (5, 3), torch.bfloat16),
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern, NaNs with payload and negative zeros among them."""
    words = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = torch.randint(
        -(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1), shape, generator=torch.Generator().manual_seed(seed)
    )
    return bits.to(words).view(dtype)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def test_roundtrip_keeps_the_bits_of_every_rank():
    layout, packed, sent = Layout(FIELDS), [], []
    for rank in range(3):
        values = {name: random_bits(shape, dtype, 10 * rank + i) for i, (name, shape, dtype) in enumerate(FIELDS)}
        sent.append(values)
        packed.append(layout.pack(torch.arange(HEADER, dtype=torch.int32) + 100 * rank - 2**31 * (rank == 2), values, CPU))
    buffers = torch.stack(packed)
    received = layout.unpack(buffers)
    for name, shape, dtype in FIELDS:
        assert received[name].shape == (3, *shape) and received[name].dtype == dtype
        for rank in range(3):
            assert torch.equal(bits_of(received[name][rank]), bits_of(sent[rank][name])), f"{name} of rank {rank}"
    assert headers_of(buffers)[:2] == [list(range(HEADER)), [100 + i for i in range(HEADER)]]
    assert headers_of(buffers)[2] == [200 - 2**31 + i for i in range(HEADER)]


def test_sections_are_aligned_disjoint_and_in_order():
    layout = Layout(FIELDS)
    end = HEADER * 4
    for section, (name, shape, dtype) in zip(layout.sections, FIELDS, strict=True):
        assert section.name == name and section.start % ALIGN == 0 and end <= section.start < end + ALIGN
        assert section.stop - section.start == torch.Size(shape).numel() * dtype.itemsize
        end = section.stop
    assert end <= layout.nbytes < end + ALIGN and layout.nbytes % ALIGN == 0
    assert layout.pack(torch.zeros(HEADER, dtype=torch.int32), {}, CPU).nbytes == layout.nbytes


def test_unpack_makes_views():
    layout = Layout(FIELDS)
    buffers = torch.zeros(2, layout.nbytes, dtype=torch.uint8)
    begin = buffers.data_ptr()
    for name, field in layout.unpack(buffers).items():
        assert field.numel() == 0 or begin <= field.data_ptr() < begin + buffers.nbytes, f"{name} was copied"


def test_missing_tokens_read_as_padding():
    """A rank with fewer tokens than the largest: its positions are -1 beyond them."""
    layout = Layout([("positions", (4,), torch.int32), ("k", (4, 2), torch.float32)])
    buffer = layout.pack(
        torch.zeros(HEADER, dtype=torch.int32), {"positions": torch.tensor([7, 8], dtype=torch.int32), "k": torch.ones(2, 2)}, CPU
    )
    fields = layout.unpack(buffer.unsqueeze(0))
    assert fields["positions"].tolist() == [[7, 8, -1, -1]]
    assert bool(fields["k"].isfinite().all()) and fields["k"][0, :2].eq(1).all()


def test_a_field_that_is_not_sent_leaves_the_others_alone():
    layout = Layout(FIELDS)
    values = {"ids": torch.arange(5, dtype=torch.int32)}
    fields = layout.unpack(layout.pack(torch.zeros(HEADER, dtype=torch.int32), values, CPU).unsqueeze(0))
    assert fields["ids"].tolist() == [[0, 1, 2, 3, 4]]
