"""Files of learned weights: what is read, and what is refused with which words."""

import pytest
import torch
from safetensors.torch import save_file

from pikv_ds.codecs.weights import read_file, read_weights

WANTED = {"w": ("layers", "heads", 3), "b": ("layers", "heads")}
GOOD = {"w": torch.arange(12.0).view(2, 2, 3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}


def saved(folder, tensors, **about):
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "weights", about or None)
    return str(folder / "weights")


def test_tensors_come_as_the_file_holds_them(tmp_path):
    path = saved(tmp_path, GOOD | {"other": torch.full((1,), torch.nan)}, made="here")
    found = read_weights(path, WANTED)
    assert set(found) == set(WANTED) and all(torch.equal(found[name], GOOD[name]) for name in WANTED)
    assert found["b"].dtype == torch.bfloat16
    assert read_file(path)[1] == {"made": "here"}


@pytest.mark.parametrize(
    "changed",
    [
        {"b": torch.ones(2, 3)},  # heads is 2 in w
        {"w": torch.ones(2, 2, 4)},
        {"b": torch.ones(2)},
        {"b": torch.tensor([[1.0, torch.inf], [1.0, 1.0]])},
    ],
    ids=["name", "size", "dimensions", "infinite"],
)
def test_what_does_not_fit_is_refused(tmp_path, changed):
    path = saved(tmp_path, GOOD | changed)
    held = str(tuple(next(iter(changed.values())).shape))
    with pytest.raises(ValueError, match=r"^gate = a file of finite weights, but .*; needed: 'w' \(layers, heads, 3\), 'b'") as error:
        read_weights(path, WANTED, "gate")
    assert held in str(error.value)


def test_a_missing_tensor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds {'w': .*needed: .*'b'"):
        read_weights(saved(tmp_path, {"w": GOOD["w"]}), WANTED)


@pytest.mark.parametrize("text", [None, "no tensors"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, text):
    path = tmp_path / "weights"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="path = a readable safetensors file, got '.*weights'"):
        read_weights(str(path), WANTED)
