"""Decode of tiny models over the cache with the ops that PIKV_OPS names; the results as JSON on stdout."""

from __future__ import annotations

import json

import torch

from tests.dist.jobs.exact import generate, generate_sharded
from tests.tiny_models import prompt, tiny_model

EXACT = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")  # full attention, window, latent, sinks and window
NEW_TOKENS = 6


def main() -> None:
    rows = []
    for family in EXACT:
        model, ids = tiny_model(family), prompt(21, seed=2, batch=2)
        dense = generate(model, ids, new_tokens=NEW_TOKENS)
        ours = generate_sharded(model, ids, new_tokens=NEW_TOKENS, config={"page_size": 4, "storage": {"num_shards": 3}})
        rows.append({
            "name": family, "tokens_same": torch.equal(dense.tokens, ours.tokens), "difference": ours.difference(dense),
            "attention_impl": ours.stats["attention_impl"],
        })  # fmt: skip
    for method in ("int8", "int4", "fp8_e4m3"):
        config = {"compression": {"method": method}, "storage": {"num_shards": 3}}
        run = generate_sharded(tiny_model("qwen3_moe"), prompt(210, seed=2), new_tokens=NEW_TOKENS, config=config)
        rows.append({"name": method, "logits": run.logits.flatten().tolist(), "attention_impl": run.stats["attention_impl"]})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
