import pytest
from transformers import AutoConfig

from pikv_ds import bundled
from pikv_ds.adapters.hf.model_spec import load_model_config, read_model_spec
from pikv_ds.errors import UnsupportedError

# model_type, options -> (num_kv_heads, k_dim, v_dim, latent), windows of the first two layers
FAMILIES = [
    ("qwen3_moe", {"head_dim": 128}, (4, 128, 128, False), [None, None]),
    ("qwen2_moe", {}, (16, 128, 128, False), [None, None]),
    ("olmoe", {}, (16, 128, 128, False), [None, None]),
    ("mixtral", {}, (8, 128, 128, False), [None, None]),
    ("mixtral", {"sliding_window": 4096}, (8, 128, 128, False), [4096, 4096]),
    ("gpt_oss", {}, (8, 64, 64, False), [128, None]),
    ("deepseek_v2", {}, (1, 576, 512, True), [None, None]),
    ("deepseek_v3", {}, (1, 576, 512, True), [None, None]),
    ("llama", {}, (32, 128, 128, False), [None, None]),
    ("mistral", {}, (8, 128, 128, False), [4096, 4096]),
    ("gpt2", {}, (12, 64, 64, False), [None, None]),
    ("falcon", {}, (1, 64, 64, False), [None, None]),
    ("gpt_bigcode", {}, (1, 64, 64, False), [None, None]),
    ("mimo_v2_flash", {}, (4, 192, 128, False), [None, 129]),
]


@pytest.mark.parametrize("model_type, options, shape, windows", FAMILIES, ids=lambda value: str(value)[:20])
def test_families(model_type, options, shape, windows):
    config = AutoConfig.for_model(model_type, **options)
    layers = read_model_spec(config)
    assert [layer.layer_idx for layer in layers] == list(range(config.num_hidden_layers))
    assert [layer.window for layer in layers[:2]] == windows
    for layer in layers:
        assert (layer.num_kv_heads, layer.k_dim, layer.v_dim, layer.latent) == shape


def test_bundled_model_is_read_from_folder_and_from_file():
    for path in (bundled.model_path(), bundled.model_path() / "config.json"):
        layers = read_model_spec(load_model_config(path))
        assert len(layers) == 4
        assert sum(layer.values_per_token for layer in layers) == 512


@pytest.mark.parametrize(
    "model_type, said",
    [
        ("deepseek_v32", "indexed_attention"),
        ("llama4_text", "chunked_attention"),
        ("t5", "encoder-decoder"),
    ],
)
def test_what_cannot_be_stored_is_named(model_type, said):
    with pytest.raises(UnsupportedError, match=said):
        read_model_spec(AutoConfig.for_model(model_type))


def test_a_path_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder or config.json"):
        load_model_config(tmp_path / "absent")
    with pytest.raises(UnsupportedError, match="holds no model configuration"):
        load_model_config(tmp_path)
