"""Write kept.safetensors: what kvpress keeps of random cases. Run it in an environment with kvpress, from the repository's root:

pip install kvpress==0.5.5 torch==2.13.0 transformers==5.2.0
python -m tests.kvpress.make_cases
"""

import json
import random
from pathlib import Path

import torch
import transformers
from kvpress import AdaKVPress, ExpectedAttentionPress, KnormPress, SnapKVPress, StreamingLLMPress, TOVAPress
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

from tests.kvpress.inputs import HEAD_DIM, THETA, Case, digest, tensors

WINDOW = 8  # of SnapKV
PRESSES = {
    "knorm": lambda ratio: KnormPress(ratio),
    "streaming_llm": lambda ratio: StreamingLLMPress(ratio, n_sink=4),
    "snapkv": lambda ratio: SnapKVPress(ratio, window_size=WINDOW, kernel_size=5),
    "tova": lambda ratio: TOVAPress(ratio),
    "expected_attention": lambda ratio: ExpectedAttentionPress(ratio, n_future_positions=64, n_sink=4),
}


def attention(case: Case) -> LlamaAttention:
    """An attention module whose queries before RoPE are its input."""
    config = LlamaConfig(
        hidden_size=case.num_q_heads * HEAD_DIM,
        num_attention_heads=case.num_q_heads,
        num_key_value_heads=case.num_kv_heads,
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attn_implementation="sdpa",
    )
    module = LlamaAttention(config, 0)
    module.q_proj.weight.data = torch.eye(config.hidden_size)
    module.rotary_emb = LlamaRotaryEmbedding(config)
    return module


@torch.no_grad()
def kept(case: Case) -> Tensor:
    """[Hkv, L] bool."""
    q, k, v = tensors(case)
    module, ratio = attention(case), 1 - (case.kept + 0.5) / case.length  # kvpress rounds what is kept down
    position_embeddings = module.rotary_emb(q, torch.arange(case.length).unsqueeze(0))
    hidden, keys, values = q.flatten(1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    press = PRESSES[case.method](ratio)
    inputs = (module, hidden, keys.clone(), values, None, {"position_embeddings": position_embeddings})
    if case.heads == "adaptive":
        AdaKVPress(press).compress(*inputs)
        _, heads, positions = module.masked_key_indices
        mask = torch.ones(case.num_kv_heads, case.length, dtype=torch.bool)
        mask[heads, positions] = False
        return mask
    assert press.compress(*inputs)[0].shape[2] == case.kept, "kvpress rounds the ratio to another number of entries"
    best = press.score(*inputs).topk(case.kept, dim=-1).indices[0]
    return torch.zeros(case.num_kv_heads, case.length, dtype=torch.bool).scatter_(1, best, True)


def cases() -> list[Case]:
    rng, listed = random.Random(0), []
    for idx in range(1200):
        method = list(PRESSES)[idx % 5]
        heads = ("shared", "shared", "uniform", "adaptive")[idx // 5 % 4]
        length = rng.randrange(24, 72)
        num_kv_heads = 1 if heads == "shared" else 2
        case = Case(method, heads, idx, length, num_kv_heads * rng.choice([1, 2, 4]), num_kv_heads, rng.randrange(WINDOW + 4, length - 2))
        if heads != "shared" and method in ("streaming_llm", "tova"):
            heads, case = "shared", case._replace(heads="shared", num_kv_heads=1)  # these keep the same entries for every head
        listed.append(case)
    return listed


def main() -> None:
    listed = cases()
    masks = [kept(case).flatten() for case in listed]
    versions = {"kvpress": "0.5.5", "torch": torch.__version__, "transformers": transformers.__version__}
    about = {"cases": json.dumps(listed), "digest": repr(digest(listed)), "window": str(WINDOW), "made with": json.dumps(versions)}
    flat = torch.cat(masks)
    bits = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    save_file({"kept": bits.sum(1).to(torch.uint8)}, Path(__file__).parent / "kept.safetensors", about)


if __name__ == "__main__":
    main()
