"""The file of a trained part: what is written is read, and what does not fit is refused with words that help."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from pikv_ds.codecs.part_file import PartFile, TrainedLayer
from pikv_ds.errors import ConfigError
from pikv_ds.spec import LayerSpec

LAYERS = (TrainedLayer(2, 8, 8, 4), TrainedLayer(2, 8, 8, 4))
NORMS = torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(1)) + 0.5


def part_file(**more) -> PartFile:
    given = {"part": "kv_gate", "layers": LAYERS, "options": {"page_size": 16}, "weights": {"a": torch.arange(3.0)}}
    return PartFile(**{**given, "fingerprint": list(NORMS), "about": {"model": "tiny", "text": "bundled"}, **more})


def spec(layer: int = 0, **more) -> LayerSpec:
    return LayerSpec(**{"layer_idx": layer, "num_kv_heads": 2, "k_dim": 8, "v_dim": 8, **more})


def test_what_is_written_is_read(tmp_path):
    part_file().save(tmp_path / "a.safetensors")
    found = PartFile.load(tmp_path / "a.safetensors", "kv_gate")
    assert (found.layers, found.options, dict(found.about)) == (LAYERS, {"page_size": 16}, {"model": "tiny", "text": "bundled"})
    assert list(found.weights) == ["a"] and torch.equal(found.weights["a"], torch.arange(3.0))
    found.check_layers([spec(0), spec(1)], "pikv.routing.path")
    for layer in range(2):
        found.check_model(spec(layer), NORMS[layer], "pikv.routing.path")


def test_ranks_that_split_heads_check_their_own(tmp_path):
    split = [spec(layer, num_kv_heads=1, first_head=1) for layer in range(2)]
    part_file().check_layers(split, "key")
    part_file().check_model(split[0], NORMS[0][1:], "key")
    with pytest.raises(ConfigError, match="other weights"):
        part_file().check_model(split[0], NORMS[0][:1], "key")


@pytest.mark.parametrize(
    "given, said",
    [
        ([spec(0), spec(1), spec(2)], "trained for 2 layers, this model has a layer 2"),
        ([spec(k_dim=16)], "2 KV heads of width 8 and 8 in layer 0, this model has 2 of 16 and 8"),
        ([spec(num_kv_heads=4)], "this model has 4 of 8 and 8"),
        ([spec(num_kv_heads=1, k_dim=12, latent=True)], "1 of 12 and 8"),
    ],
)
def test_other_layers_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        part_file().check_layers(given, "pikv.routing.path")


def test_other_weights_are_refused():
    with pytest.raises(ConfigError, match=r"pikv.routing.path = .* other weights \(tiny\): the key projection of layer 1 differs"):
        part_file().check_model(spec(1), NORMS[1] * 1.05, "pikv.routing.path")
    part_file().check_model(spec(1), NORMS[1].bfloat16(), "pikv.routing.path")


def test_weights_of_no_model_are_refused_where_a_model_is():
    with pytest.raises(ConfigError, match="names no model"):
        dataclasses.replace(part_file(), fingerprint=[]).check_model(spec(), NORMS[0], "key")


def test_another_part_is_refused(tmp_path):
    part_file(part="scores").save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="pikv train kv_gate .* holds the part 'scores'"):
        PartFile.load(tmp_path / "a.safetensors", "kv_gate")


def test_the_old_form_is_refused(tmp_path):
    save_file({"gate": torch.zeros(2, 4, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="pikv train kv_gate .* weights of an older form"):
        PartFile.load(tmp_path / "a.safetensors", "kv_gate")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    part_file(weights={"a": torch.tensor([1.0, torch.nan])}).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="'a' of .* has values that are not"):
        PartFile.load(tmp_path / "a.safetensors", "kv_gate")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="readable safetensors file"):
        PartFile.load(tmp_path / "none.safetensors", "kv_gate")
