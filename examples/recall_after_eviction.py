"""Recall of hidden facts that are asked for only after eviction, by policies that look at no question; kvzip with and without rehearsal.

    python examples/recall_after_eviction.py [--prompts 16] [--seed 1000] [--ratio 0.25] [--page-size 8] [--json FILE]

The bundled model reads a prompt of 1,024 tokens less question and answer, everything is kept; then comes the question, token by token, and
with its first token the prompt is evicted from.
"""

import argparse
from itertools import groupby

import torch

import pikv_ds
from pikv_ds import bundled
from pikv_ds.adapters.hf.rehearse import rehearse
from pikv_ds.bundled.recall import KINDS, Prose, RecallPrompt, recall_prompt
from pikv_ds.launch.output import print_table, write_json

CONTEXT, CHUNK = 1024, 32
RUNS = [("kvzip", True), ("kvzip", False), ("keydiff", False), ("streaming_llm", False), ("random", False)]


@torch.no_grad()
def answers(model, prose: Prose, prompts: list[RecallPrompt], scheduling: dict, page_size: int, repeats: bool) -> tuple[int, float]:
    """How many of these prompts, whose questions are equally long, are answered; KV bytes per token."""
    ids, question = torch.tensor([prompt.ids for prompt in prompts]), prompts[0].question_tokens
    with pikv_ds.attach(model, {"page_size": page_size, "scheduling": scheduling}) as cache:
        for part in ids[:, :-question].split(CHUNK, 1):
            model(part, cache=cache, logits_to_keep=1)
        if repeats:
            rehearse(model, cache, ids[:, 1:-question], chunk=CHUNK)
        said = []
        for token in ids[:, -question:].split(1, 1):
            answer = model(token, cache=cache).logits[:, -1:].argmax(-1)
        while len(said) < prose.answer_tokens():
            said.append(answer)
            answer = model(answer, cache=cache).logits[:, -1:].argmax(-1)
        size = cache.stats()["kv_bytes_allocated"] / len(prompts) / CONTEXT
    texts = [prose.tokenizer.decode(row).strip() for row in torch.cat(said, 1)]
    return sum(text.startswith(prompt.answer) for text, prompt in zip(texts, prompts, strict=True)), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--page-size", type=int, default=8)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    model, tokenizer = bundled.load()
    prose = Prose(tokenizer, bundled.evaluation_text())
    length, rows = CONTEXT - prose.answer_tokens(), []
    prompts = [
        recall_prompt(prose, length, kind=KINDS[i % 2], depth=min((i // 2 + 0.5) / (args.prompts // 2), 1.0), seed=args.seed + i)
        for i in range(args.prompts)
    ]
    prompts.sort(key=lambda prompt: prompt.question_tokens)
    for method, repeats in RUNS:
        scheduling = {"method": method, "budget_ratio": args.ratio, "prefill": "keep", "recent_tokens": 16}
        groups = [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.question_tokens)]
        found = [answers(model, prose, group, scheduling, args.page_size, repeats) for group in groups]
        share = sum(number for number, _ in found) / len(prompts)
        rows.append(
            {"method": method, "rehearsal": repeats, "recall": round(share, 4), "bytes_per_token": round(max(size for _, size in found))}
        )
    print_table(f"asked after eviction, {args.ratio} of the entries, pages of {args.page_size}, {len(prompts)} prompts", rows)
    write_json(
        args.json, f"python examples/recall_after_eviction.py --prompts {args.prompts} --seed {args.seed} --ratio {args.ratio}", rows
    )


if __name__ == "__main__":
    main()
