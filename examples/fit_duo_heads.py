"""Find the retrieval heads of a model for the policy duo_heads: KV heads that look back to a hidden fact when it is asked for.

    python examples/fit_duo_heads.py heads.safetensors [--model PATH] [--prompts 16]

Per layer and KV head: the largest share of attention that a query head of it gives to the asked fact, at the tokens that end the question
and begin the answer, mean over prompts, divided by the largest of all heads. DuoAttention trains a gate per head on such prompts instead.
Use it with "scheduling": {"method": "duo_heads", "path": "heads.safetensors", "head_budget": "adaptive", "head_floor": 0.0,
"budget_ratio": 0.5}.
"""

import argparse

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pikv_ds import bundled
from pikv_ds.bundled.recall import KINDS, Prose, RecallPrompt, recall_prompt


@torch.no_grad()
def looks_back(model, tokenizer, prompt: RecallPrompt) -> torch.Tensor:
    """[L, H] share of attention on the digits of the asked fact, from the last token of the question and all but the last of the answer."""
    answer = tokenizer(f" {prompt.answer}", add_special_tokens=False)["input_ids"]
    out = model(torch.tensor([[*prompt.ids, *answer]]), output_attentions=True)
    share = torch.stack([layer[0, :, len(prompt.ids) - 1 : -1] for layer in out.attentions])  # [L, Hq, query, entry]
    places = [
        i for i in range(len(prompt.ids)) if prompt.ids[i : i + len(answer)] == answer or prompt.ids[i : i + len(answer) - 1] == answer[1:]
    ]
    fact = torch.zeros(share.shape[-1], dtype=torch.bool)
    for place in places:
        fact[place : place + len(answer)] = True
    return share[..., fact].sum(-1).mean(-1).unflatten(1, (model.config.num_key_value_heads, -1)).amax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--model", default=str(bundled.model_path()))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    prose = Prose(tokenizer, bundled.evaluation_text())
    prompts = [
        recall_prompt(prose, args.context, kind=KINDS[i % 2], depth=(i + 0.5) / args.prompts, seed=200_000 + i) for i in range(args.prompts)
    ]  # seeds that no evaluation starts at
    heads = torch.stack([looks_back(model, tokenizer, prompt) for prompt in prompts]).mean(0)
    save_file({"heads": (heads / heads.max()).contiguous()}, args.output)
    found = [[round(x, 3) for x in row] for row in heads.tolist()]
    print(f"wrote {args.output}: share of attention on the fact, by layer and KV head: {found}")


if __name__ == "__main__":
    main()
