"""Recall of hidden facts that are asked for only after eviction, by policies that look at no question; kvzip with and without rehearsal.

    python examples/recall_after_eviction.py [--prompts 16] [--seeds 1000] [--ratios 0.25] [--head-budgets shared,adaptive] \\
        [--methods kvzip,keydiff,...] [--scores FILE,...] [--page-size 8] [--json FILE]

The bundled model reads a prompt of 1,024 tokens less question and answer, everything is kept; then comes the question, token by token, and
with its first token the prompt is evicted from. --scores: files of `pikv train eviction_scorer` for learned_scores, one for each seed in
turn. "mass": the share of the attention of question and answer to the prompt, as the model without eviction has it, that lies on what was
kept; mean over layers, heads and prompts. "evict_ms": processor time of the scores of all layers, the least of five.
"""

import argparse
import time
from itertools import groupby
from typing import NamedTuple

import torch

import pikv_ds
from pikv_ds import bundled
from pikv_ds.adapters.hf.record import Recorder
from pikv_ds.adapters.hf.rehearse import rehearse
from pikv_ds.bundled.recall import KINDS, Prose, RecallPrompt, recall_prompt
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.launch.output import print_table, write_json
from pikv_ds.training.recorded import LayerWindow

CONTEXT = 1024
RUNS = {
    "kvzip+rehearsal": ("kvzip", True), "kvzip": ("kvzip", False), "keydiff": ("keydiff", False), "streaming_llm": ("streaming_llm", False),
    "random": ("random", False), "snapkv": ("snapkv", False), "h2o": ("h2o", False), "learned_scores": ("learned_scores", False),
}  # fmt: skip
DEFAULT = "kvzip+rehearsal,kvzip,keydiff,streaming_llm,random"


class Found(NamedTuple):
    """Of some prompts: how many are answered, sum of the mass of each, KV bytes per token, milliseconds."""

    answered: int
    mass: float
    bytes_per_token: float
    evict_ms: float


class Looked:
    """What questions and answers look at when nothing is evicted."""

    def __init__(self, model, prose: Prose) -> None:
        self.model, self.prose, self.known = model, prose, {}

    def of(self, prompt: RecallPrompt) -> list[torch.Tensor]:
        """[layer] [H, n] f32: share of the attention of its question and answer that every token of the prompt before has; sums to 1."""
        key = tuple(prompt.ids)
        if key not in self.known:
            ids = torch.tensor([[*prompt.ids, *self.prose.encode(f" {prompt.answer}")]])
            window, read = Recorder(self.model, ids, keep_bytes=0)[0], len(prompt.ids) - prompt.question_tokens
            self.known[key] = [share_of_prompt(layer, read) for layer in window.layers]
        return self.known[key]


def share_of_prompt(layer: LayerWindow, read: int) -> torch.Tensor:
    q, k = layer.q[read:].unflatten(1, (layer.k.shape[1], -1)), layer.k.transpose(0, 1)
    logits = layer.scale * torch.einsum("qhgd,htd->hgqt", q, k)
    later = torch.arange(k.shape[1]) > torch.arange(read, k.shape[1]).unsqueeze(1)
    share = logits.masked_fill(later, -torch.inf).softmax(-1)[..., :read].mean((1, 2))
    return share / share.sum(-1, keepdim=True)


def mass_of(probe: CacheProbe, looked: list[list[torch.Tensor]]) -> float:
    """Sum over rows. looked: of each row."""
    total = 0.0
    for layer in range(probe.num_layers):
        for tables, shares in zip(probe.kept(layer), looked, strict=True):
            share = shares[layer]
            heads = zip(tables if len(tables) > 1 else tables * len(share), share, strict=True)
            total += sum(float(own[[p for p in kept if p < len(own)]].sum()) for kept, own in heads) / len(share) / probe.num_layers
    return total


def scoring_ms(probe: CacheProbe) -> float:
    best = float("inf")
    for _ in range(5):
        begun = time.process_time()
        for layer in range(probe.num_layers):
            probe.scores(layer)
        best = min(best, time.process_time() - begun)
    return 1e3 * best


@torch.no_grad()
def answers(model, prose: Prose, prompts: list[RecallPrompt], block: dict, repeats: bool, chunk: int, looked: Looked) -> Found:
    """Of prompts whose questions are equally long."""
    ids, question = torch.tensor([prompt.ids for prompt in prompts]), prompts[0].question_tokens
    with pikv_ds.attach(model, block) as cache:
        for part in ids[:, :-question].split(chunk, 1):
            model(part, cache=cache, logits_to_keep=1)
        if repeats:
            rehearse(model, cache, ids[:, 1:-question], chunk=chunk)
        said, probe, spent, mass = [], CacheProbe(cache.core), None, 0.0
        for token in ids[:, -question:].split(1, 1):
            spent = scoring_ms(probe) if spent is None else spent
            answer = model(token, cache=cache).logits[:, -1:].argmax(-1)
            mass = mass or mass_of(probe, [looked.of(prompt) for prompt in prompts])  # after its first token: evicted from once
        while len(said) < prose.answer_tokens():
            said.append(answer)
            answer = model(answer, cache=cache).logits[:, -1:].argmax(-1)
        size = cache.stats()["kv_bytes_allocated"] / len(prompts) / CONTEXT
    texts = [prose.tokenizer.decode(row).strip() for row in torch.cat(said, 1)]
    found = sum(text.startswith(prompt.answer) for text, prompt in zip(texts, prompts, strict=True))
    return Found(found, mass, size, spent / len(prompts))


def prompts_of(prose: Prose, count: int, seed: int) -> list[list[RecallPrompt]]:
    """In groups of equally long questions."""
    length = CONTEXT - prose.answer_tokens()
    prompts = [
        recall_prompt(prose, length, kind=KINDS[i % 2], depth=min((i // 2 + 0.5) / (count // 2), 1.0), seed=seed + i) for i in range(count)
    ]
    prompts.sort(key=lambda prompt: prompt.question_tokens)
    return [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.question_tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", default="1000")
    parser.add_argument("--ratios", default="0.25")
    parser.add_argument("--head-budgets", default="shared")
    parser.add_argument("--methods", default=DEFAULT, help=f"of {', '.join(RUNS)}")
    parser.add_argument("--scores", default="", metavar="FILE,...")
    parser.add_argument("--page-size", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    model, tokenizer = bundled.load()
    prose, rows, files = Prose(tokenizer, bundled.evaluation_text()), [], args.scores.split(",")
    looked = Looked(model, prose)
    for turn, seed in enumerate(args.seeds.split(",")):
        groups = prompts_of(prose, args.prompts, int(seed))
        for name in args.methods.split(","):
            for heads in args.head_budgets.split(","):
                for ratio in map(float, args.ratios.split(",")):
                    method, repeats = RUNS[name]
                    scheduling = {"method": method, "budget_ratio": ratio, "prefill": "keep", "recent_tokens": 16, "head_budget": heads}
                    scheduling |= {"path": files[turn % len(files)]} if method == "learned_scores" else {}
                    block = {"page_size": args.page_size, "scheduling": scheduling}
                    found = [answers(model, prose, group, block, repeats, args.chunk, looked) for group in groups]
                    row = {"method": method, "rehearsal": repeats, "head_budget": heads, "budget": ratio, "seed": int(seed)}
                    row |= {"recall": round(sum(x.answered for x in found) / args.prompts, 4)}
                    row |= {"mass": round(sum(x.mass for x in found) / args.prompts, 4)}
                    row |= {"bytes_per_token": round(max(x.bytes_per_token for x in found))}
                    rows.append(row | {"evict_ms": round(min(x.evict_ms for x in found), 2)})
                    print(row, flush=True)
    print_table(f"asked after eviction, pages of {args.page_size}, {args.prompts} prompts a seed", rows)
    given = " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if value and name not in ("json", "scores")
    )
    write_json(args.json, f"python examples/recall_after_eviction.py {given}", rows)


if __name__ == "__main__":
    main()
