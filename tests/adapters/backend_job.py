"""Decode of tiny models over the cache with the ops that PIKV_OPS names; the results as JSON on stdout."""

from __future__ import annotations

import json
import os

import torch

from tests.dist.jobs.exact import generate, generate_sharded
from tests.tiny_models import prompt, tiny_model

EXACT = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")  # full attention, window, latent, sinks and window
AGREEING = {
    **{method: {"compression": {"method": method}} for method in ("int8", "int4", "fp8_e4m3")},
    "bounds": {"page_size": 8, "routing": {"method": "bounds", "budget_ratio": 0.3, "sink_tokens": 4, "recent_tokens": 16}},
}
NEW_TOKENS = 6


def main() -> None:
    device = "cuda" if os.environ.get("PIKV_OPS") in ("cuda", "nvrtc") else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for family in EXACT:
        model, ids = tiny_model(family).to(device), prompt(21, seed=2, batch=2).to(device)
        dense = generate(model, ids, new_tokens=NEW_TOKENS)
        ours = generate_sharded(model, ids, new_tokens=NEW_TOKENS, config={"page_size": 4, "storage": {"num_shards": 3}})
        rows.append({
            "name": family, "tokens_same": torch.equal(dense.tokens, ours.tokens), "difference": ours.difference(dense),
            "attention_impl": ours.stats["attention_impl"],
        })  # fmt: skip
    for name, config in AGREEING.items():
        model, ids = tiny_model("qwen3_moe").to(device), prompt(210, seed=2).to(device)
        run = generate_sharded(model, ids, new_tokens=NEW_TOKENS, config={**config, "storage": {"num_shards": 3}})
        rows.append({"name": name, "logits": run.logits.flatten().tolist(), "attention_impl": run.stats["attention_impl"]})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
