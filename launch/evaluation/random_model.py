"""A small model with random weights, a given head width and the bundled tokenizer: for bytes, which do not depend on the weights.

python -m pikv_ds.launch.evaluation.random_model FOLDER [--head-dim 128]
"""

from __future__ import annotations

import argparse


def make(folder: str, head_dim: int) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from pikv_ds.bundled import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path(), local_files_only=True)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64, vocab_size=len(tokenizer), max_position_embeddings=8192,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    make(args.folder, args.head_dim)


if __name__ == "__main__":
    main()
