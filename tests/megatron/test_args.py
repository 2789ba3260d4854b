"""What model the arguments of a Megatron-LM checkpoint say, and which of them are refused, without process groups."""

import dataclasses
import json
from argparse import Namespace

import pytest
import torch
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.launch.cli import build_parser
from pikv_ds.launch.evaluation.plan import read_spec
from pikv_ds.launch.evaluation.tokenizer import check_vocabulary, open_tokenizer, tokenizer_path
from pikv_ds.megatron_patch.args_config import Architecture, read_architecture
from pikv_ds.megatron_patch.checkpoint_folder import checkpoint_args
from pikv_ds.spec import LayerSpec
from tests.megatron.megatron_lm import TRACKER, arguments
from tests.megatron.models import SHAPE

LATENT = dict(
    multi_latent_attention=True, group_query_attention=False, q_lora_rank=24, kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=8,
    v_head_dim=12, rotary_scaling_factor=4, mscale=0.7,
)  # fmt: skip


def config_of(architecture: Architecture) -> TransformerConfig:
    return architecture.kind(**architecture.config)


def test_every_field_of_the_model_is_the_one_that_megatron_would_build():
    """Beside the same model written out by hand; what is not named here must be Megatron-Core's default, whatever a GPU run had."""
    own = dict(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, kv_channels=8, num_query_groups=4, num_moe_experts=8,
        moe_router_topk=2, moe_ffn_hidden_size=32, layernorm_epsilon=1e-6, moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
    )  # fmt: skip
    expected, built = TransformerConfig(**{**SHAPE, **own}), config_of(read_architecture(arguments()))
    different = {
        field.name: (getattr(built, field.name), getattr(expected, field.name))
        for field in dataclasses.fields(TransformerConfig)
        if getattr(built, field.name) != getattr(expected, field.name) and "init_method" not in field.name
    }
    assert different == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"swiglu": False}, {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}),
        ({"swiglu": False, "squared_relu": True}, {"gated_linear_unit": False, "activation_func": squared_relu}),
        ({"swiglu": False, "quick_geglu": True}, {"gated_linear_unit": True, "activation_func": quick_gelu}),
        ({"num_experts": None, "moe_router_topk": None}, {"num_moe_experts": None}),
        ({"group_query_attention": False}, {"num_query_groups": 8}),
        ({"moe_shared_expert_intermediate_size": 48}, {"moe_shared_expert_intermediate_size": 48}),
        ({"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True}, {"moe_router_score_function": "sigmoid"}),
        ({"moe_router_topk_scaling_factor": 2.5}, {"moe_router_topk_scaling_factor": 2.5}),
        ({"window_size": (15, 0), "window_attn_skip_freq": 2}, {"window_size": (15, 0), "window_attn_skip_freq": 2}),
        ({"no_rope_freq": [1, 0]}, {"no_rope_freq": [1, 0]}),
        ({"moe_input_jitter_eps": 0.01}, {"moe_input_jitter_eps": None}),  # a device of training
        ({"rope_type": "rope"}, {"multi_latent_attention": False}),
        (LATENT | {"rope_type": "rope"}, {"rope_type": "rope", "kv_lora_rank": 16}),
        (LATENT, {"rope_type": "yarn", "q_lora_rank": 24}),
        ({"fp8": "hybrid", "mtp_num_layers": 1}, {"fp8": None, "mtp_num_layers": None}),
    ],
)
def test_what_is_taken(changes, expected):
    config = config_of(read_architecture(arguments(**changes)))
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_rest_goes_to_the_model():
    old = arguments(apply_layernorm_1p=True, untie_embeddings_and_output_weights=False, use_rope_scaling=True, rotary_percent=0.5)
    old.disable_bias_linear = True  # its name in older versions
    del old.add_bias_linear
    architecture = read_architecture(old)
    assert architecture.gamma_from_one and architecture.config["add_bias_linear"] is False
    assert (architecture.max_positions, architecture.vocab_size, architecture.num_experts) == (512, 2048, 8)
    assert architecture.gpt == {
        "vocab_size": 2048, "max_sequence_length": 512, "share_embeddings_and_output_weights": True, "position_embedding_type": "rope",
        "rotary_percent": 0.5, "rotary_base": 50000, "rope_scaling": True,
    }  # fmt: skip


def test_geometry():
    windows = read_architecture(arguments(num_layers=4, window_size=(15, 0), window_attn_skip_freq=2)).layer_specs()
    assert windows == [
        LayerSpec(layer_idx=idx, num_kv_heads=4, k_dim=8, v_dim=8, window=window) for idx, window in enumerate([16, None, 16, None])
    ]
    latent = read_architecture(arguments(**LATENT))
    assert latent.kind is MLATransformerConfig and latent.config["mscale"] == 0.7
    assert latent.layer_specs()[1] == LayerSpec(layer_idx=1, num_kv_heads=1, k_dim=24, v_dim=16, latent=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hybrid_layer_pattern": "M*E"}, "hybrid_layer_pattern = 'M*E'"),
        ({"is_hybrid_model": True, "num_layers": None}, "is_hybrid_model = True"),
        ({"spec": ["my", "spec"]}, "spec = ['my', 'spec']"),
        ({"heterogeneous_layers_config_path": "x.json"}, "heterogeneous_layers_config_path"),
        ({"experimental_attention_variant": "dsa"}, "experimental_attention_variant = 'dsa'"),
        ({"linear_attention_freq": 4}, "linear_attention_freq = 4"),
        ({"attention_output_gate": True}, "attention_output_gate"),
        ({"position_embedding_type": "mrope"}, "position_embedding_type = 'mrope' in the checkpoint's arguments: legal are rope, "),
        ({"rotary_seq_len_interpolation_factor": 2}, "rotary_seq_len_interpolation_factor = 2"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "rope_scaling_factor = 32.0"),
        ({"moe_mlp_glu_interleave_size": 32}, "moe_mlp_glu_interleave_size = 32"),
        ({"use_legacy_models": True}, "use_legacy_models"),
        ({"num_attention_heads": None}, "lack num_attention_heads"),
        ({"rotary_base": None, "moe_router_topk": None}, "lack rotary_base, moe_router_topk"),
    ],
)
def test_what_is_refused(changes, words):
    with pytest.raises(UnsupportedError) as refusal:
        read_architecture(arguments(**changes))
    assert words in str(refusal.value)


def test_what_megatron_core_does_not_take_is_said():
    with pytest.raises(UnsupportedError, match="does not take the checkpoint's arguments as they are"):
        read_architecture(arguments(moe_expert_capacity_factor=1.0, moe_router_load_balancing_type="sinkhorn")).layer_specs()


def checkpoint(folder, common: dict, name: str = "iter_0000007"):
    (folder / name).mkdir(parents=True)
    (folder / name / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save(common, folder / name / "common.pt")
    (folder / TRACKER).write_text(name.removeprefix("iter_"))
    return folder


def spec_of(folder, *words: str):
    return read_spec(build_parser().parse_args(["eval", "--backend", "megatron", "--load", str(folder), "--context", "96", *words]))[0]


@pytest.fixture(scope="module")
def tokenizer():
    from pikv_ds.bundled import model_path

    return str(model_path())


@pytest.mark.parametrize("name", ["iter_0000007", "release"])
def test_the_command_reads_the_folder_of_save(tmp_path, tokenizer, name):
    folder = checkpoint(tmp_path / "saved", {"args": arguments(), "iteration": 7}, name)
    for given in (folder, folder / name):
        spec = spec_of(given, "--tokenizer", tokenizer, "--ranks", "4", "--tp", "2")
        assert (spec.load, spec.model, spec.tokenizer, spec.ep) == (str(folder / name), str(folder / name), tokenizer, 2)
    with pytest.raises(ConfigError, match="--ep 3"):
        spec_of(folder, "--tokenizer", tokenizer, "--ranks", "3", "--ep", "3")
    with pytest.raises(ConfigError, match="legal for this model is 2 to 512"):
        spec_of(folder, "--tokenizer", tokenizer, "--context", "1024")


def test_what_the_command_refuses(tmp_path, tokenizer):
    own = checkpoint(tmp_path / "own", {"args": arguments()})
    bare, partial = checkpoint(tmp_path / "bare", {"iteration": 7}), checkpoint(tmp_path / "partial", {"args": Namespace(num_layers=2)})
    for folder, words, message in [
        (bare, ["--tokenizer", tokenizer], "has no 'args' (it has ['iteration'])"),
        (partial, ["--tokenizer", tokenizer], "lack hidden_size, num_attention_heads"),
        (own, [], "give --tokenizer T beside it, or in --model a transformers folder"),
        (own, ["--tokenizer", tokenizer, "--model", tokenizer], "without --model"),
        (own, ["--tokenizer", str(tmp_path / "none")], "no tokenizer at"),
    ]:
        with pytest.raises((ConfigError, UnsupportedError, FileNotFoundError)) as refusal:
            spec_of(folder, *words)
        assert message in str(refusal.value)
    with pytest.raises(ConfigError, match="goes with --load"):
        read_spec(build_parser().parse_args(["eval", "--tokenizer", tokenizer]))


def test_formats_that_megatron_core_does_not_read_are_named(tmp_path):
    (tmp_path / "old" / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "old" / TRACKER).write_text("3")
    (tmp_path / "fsdp").mkdir()
    (tmp_path / "fsdp" / ".metadata").write_bytes(b"")
    for folder, words in [("old", "format 'torch' (mp_rank_*)"), ("fsdp", "'torch_dcp' or 'fsdp_dtensor'")]:
        with pytest.raises(UnsupportedError) as refusal:
            checkpoint_args(tmp_path / folder)
        assert words in str(refusal.value) and "--ckpt-format torch_dist" in str(refusal.value)


def test_tokenizers(tmp_path, tokenizer):
    file = tokenizer + "/tokenizer.json"
    words = "The key is 12345."
    assert open_tokenizer(tokenizer_path(file))(words)["input_ids"] == open_tokenizer(tokenizer_path(tokenizer))(words)["input_ids"]
    check_vocabulary(open_tokenizer(file), 2048, "it")
    with pytest.raises(ConfigError, match=r"ids up to 2047, the embedding 1024 rows"):
        check_vocabulary(open_tokenizer(file), 1024, "it")
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    for given in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(ConfigError, match="save other formats"):
            tokenizer_path(str(given))
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ConfigError, match="can't open the tokenizer"):
        open_tokenizer(tokenizer_path(str(tmp_path / "tokenizer.json")))
