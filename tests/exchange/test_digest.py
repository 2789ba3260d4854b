"""Equal tensors have equal digests; another value, order, shape or bit another one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_ds.exchange.digest import digest

BASE = torch.arange(24, dtype=torch.float32).view(4, 6)


def test_equal_content_gives_an_equal_digest_of_63_bits():
    value = digest([BASE, torch.tensor([1, 2])])
    assert value == digest([BASE.clone(), torch.tensor([1, 2])])
    assert value == digest([BASE.t().contiguous().t(), torch.tensor([1, 2])]), "memory layout must not matter"
    assert 0 <= value < 2**63 and digest([]) == 0


def flip_last_bit() -> torch.Tensor:
    other = BASE.clone()
    other.view(torch.int32)[-1, -1] ^= 1
    return other


@pytest.mark.parametrize(
    "other",
    [
        [flip_last_bit()],
        [BASE.flip(0)],
        [BASE[:, :5]],
        [BASE, torch.zeros(0)],
        [BASE, torch.zeros(1)],
        [BASE[:2], BASE[2:]],
        [torch.cat([BASE.flatten(), torch.zeros(1)])],
        [-BASE],
    ],
    ids=["one-bit", "row-order", "narrower", "with-empty", "with-zero", "split", "longer", "sign"],
)
def test_any_difference_shows(other):
    assert digest(other) != digest([BASE])


def test_order_of_tensors_matters():
    a, b = torch.tensor([1, 2, 3]), torch.tensor([3, 1, 2])
    assert digest([a, b]) != digest([b, a])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_every_dtype_by_its_bits(dtype):
    ones, zeros = torch.ones(9).to(dtype), torch.zeros(9).to(dtype)
    one_changed = ones.clone()
    one_changed[4] = 0
    assert len({digest([ones]), digest([zeros]), digest([one_changed])}) == 3
    if dtype.is_floating_point:
        assert digest([zeros]) != digest([-zeros]), "-0 has other bits than 0"
        assert digest([zeros / zeros]) == digest([zeros / zeros]), "NaN equals itself by its bits"


@given(st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=12), st.data())
def test_a_swap_of_two_values_shows(values, data):
    i, j = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, len(values) - 1))
    swapped = list(values)
    swapped[i], swapped[j] = values[j], values[i]
    assert (digest([torch.tensor(values)]) == digest([torch.tensor(swapped)])) == (values == swapped)
