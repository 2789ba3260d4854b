"""Fit a KV gate: k-means of post-RoPE keys, one centroid per expert, so that an entry's expert id follows its key.

    python examples/fit_kv_gate.py gate.safetensors [--model PATH] [--tokens 2000]

Use it with "storage": {"expert_ids": "gate", "gate_path": "gate.safetensors"}. The gate decides placement only: attention stays exact.
"""

import argparse

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pikv_ds
from pikv_ds import bundled
from pikv_ds.adapters.hf.argument_names import cache_of


@torch.no_grad()
def collect_keys(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Keys of every layer as the ordinary cache holds them, [tokens, num_kv_heads * head_dim]."""
    past = cache_of(model(ids, use_cache=True))
    return [layer.keys[0].transpose(0, 1).flatten(1).float() for layer in past.layers]


def fit(keys: torch.Tensor, num_experts: int, rounds: int = 25) -> torch.Tensor:
    """Spherical k-means: unit-norm centroids [E, width], so that the largest dot product names the nearest one."""
    keys = torch.nn.functional.normalize(keys, dim=-1)
    centroids = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))[:num_experts]]
    for _ in range(rounds):
        nearest = (keys @ centroids.T).argmax(-1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, keys)
        taken = torch.bincount(nearest, minlength=num_experts) > 0
        centroids = torch.where(taken[:, None], torch.nn.functional.normalize(sums, dim=-1), centroids)
    return centroids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--model", default=str(bundled.model_path()))
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(bundled.haystack(), add_special_tokens=False)["input_ids"][: args.tokens]])
    gate = torch.stack([fit(keys, model.config.num_experts) for keys in collect_keys(model, ids)])
    save_file({"gate": gate}, args.output)
    storage = {"expert_ids": "gate", "gate_path": args.output, "num_shards": 4}
    with torch.no_grad(), pikv_ds.attach(model, {"storage": storage}) as cache:
        model(ids[:, :500])
        stats = cache.stats()
    print(f"wrote {args.output}: gate {tuple(gate.shape)}; entries by expert {stats['load_per_expert']}, spilled {stats['spilled']}")


if __name__ == "__main__":
    main()
