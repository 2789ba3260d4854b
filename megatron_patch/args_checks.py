"""What the arguments saved in a Megatron-LM checkpoint must say of its model, and what of it is not built from them, refused by name."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pikv_ds.errors import UnsupportedError

# Without these arguments a checkpoint does not say what its model is. Those after the first line have defaults in Megatron-LM, which saves
# all of them; what its older versions did not save had one meaning, which is Megatron-Core's default.
_NEEDED = (
    "num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size", "max_position_embeddings",
    "ffn_hidden_size", "kv_channels", "group_query_attention", "normalization", "norm_epsilon|layernorm_epsilon", "swiglu",
    "add_bias_linear", "position_embedding_type", "rotary_percent", "untie_embeddings_and_output_weights", "num_experts",
)  # fmt: skip
_NEEDED_OF = {"rotary": ("rotary_base",), "experts": ("moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq")}
_HYBRID = ("is_hybrid_model", "hybrid_layer_pattern", "hybrid_override_pattern")
_POSITIONS = ("rope", "learned_absolute", "none")


def check_complete(args: Namespace) -> None:
    """Raises UnsupportedError naming what is not there. Gives an old name of an argument its new one, in place."""
    if hasattr(args, "disable_bias_linear") and not hasattr(args, "add_bias_linear"):
        args.add_bias_linear = not args.disable_bias_linear
    needed = [*_NEEDED]
    if str(getattr(args, "position_embedding_type", "")) == "rope":
        needed += _NEEDED_OF["rotary"]
    if getattr(args, "num_experts", None):
        needed += _NEEDED_OF["experts"]
    if getattr(args, "group_query_attention", False):
        needed.append("num_query_groups")
    optional = ("num_experts",)
    absent = [
        names for names in needed
        if not any(hasattr(args, name) and (getattr(args, name) is not None or name in optional) for name in names.split("|"))
    ]  # fmt: skip
    if absent:
        raise UnsupportedError(
            f"the arguments in the checkpoint lack {', '.join(absent)}, so they do not say what model it is of; build the model yourself, "
            f"or name a transformers folder of the same model"
        )


def refuse_args(args: Namespace) -> None:
    """Raises UnsupportedError with the argument, its value and the reason."""

    def given(name: str) -> Any:
        return getattr(args, name, None)

    by_hand = "build the model yourself and load it with load_checkpoint"
    interleaved = "gate and up are stored interleaved, which local layers can't read"
    facts = [
        *((given(name), name, f"a HybridModel is not built from arguments; {by_hand}") for name in _HYBRID),
        (given("spec"), "spec", f"layers of a specification of your own are not built from arguments; {by_hand}"),
        (given("heterogeneous_layers_config_path"), "heterogeneous_layers_config_path",
         f"layers that differ in shape are not built; {by_hand}"),
        (given("experimental_attention_variant"), "experimental_attention_variant", "its attention reads more than keys and values"),
        (given("linear_attention_freq"), "linear_attention_freq", "its layers keep a state that is not keys and values"),
        (given("attention_output_gate"), "attention_output_gate", "the gate is not handled"),
        (given("position_embedding_type") not in (None, *_POSITIONS), "position_embedding_type", f"legal are {', '.join(_POSITIONS)}"),
        (given("rotary_seq_len_interpolation_factor") not in (None, 1), "rotary_seq_len_interpolation_factor",
         "Megatron-LM's own versions differ in whether they apply it"),
        (given("use_rope_scaling") and given("rope_scaling_factor") not in (None, 8, 8.0), "rope_scaling_factor",
         "Megatron-LM saves it and scales by 8 all the same"),
        (given("moe_mlp_glu_interleave_size"), "moe_mlp_glu_interleave_size", interleaved),
        (given("moe_shared_expert_glu_interleave_size"), "moe_shared_expert_glu_interleave_size", interleaved),
        (given("use_legacy_models"), "use_legacy_models", "models from before Megatron-Core have other weights"),
    ]  # fmt: skip
    for refused, name, why in facts:
        if refused:
            raise UnsupportedError(f"{name} = {given(name)!r} in the checkpoint's arguments: {why}")
