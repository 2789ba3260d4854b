"""Fit the network of the policy quest_mlp: from the key and value of an entry, the attention that later queries will give it.

    python examples/fit_quest_mlp.py mlp.safetensors [--model PATH] [--text FILE] [--windows 24] [--facts]

Target, per layer and KV head: log of the largest share of attention that any query at least --gap tokens later gives the entry. --facts
hides facts in every window and asks for one of them at its end, as the recall task does (with other seeds): the network then learns what is
asked about. Use it with "scheduling": {"method": "quest_mlp", "path": "mlp.safetensors", "budget_ratio": 0.25}.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pikv_ds import bundled
from pikv_ds.adapters.hf.argument_names import cache_of
from pikv_ds.bundled.recall import KINDS, Prose, recall_prompt
from pikv_ds.policies.quest_mlp import mlp_scores

FLOOR = 1e-6  # of a share, before its logarithm


def windows(prose: Prose, count: int, context: int, facts: bool) -> list[list[int]]:
    if facts:  # seeds that no evaluation starts at; the question at the end is part of the window
        prompts = [recall_prompt(prose, context, kind=KINDS[i % 2], depth=(i + 0.5) / count, seed=100_000 + i) for i in range(count)]
        return [prompt.ids for prompt in prompts]
    starts = [round(i * (len(prose.ids) - context + 1) / max(count, 1)) for i in range(count)]
    return [[*prose.prefix, *prose.ids[start : start + context - len(prose.prefix)]] for start in starts]


@torch.no_grad()
def entries(model, ids: list[int], gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [L, H, n, k_dim + v_dim] and targets [L, H, n] of the entries that at least `gap` later queries could see."""
    out = model(torch.tensor([ids]), output_attentions=True, use_cache=True)
    x = torch.stack([torch.cat([layer.keys[0], layer.values[0]], -1) for layer in cache_of(out).layers])
    share = torch.stack([layer[0].unflatten(0, (x.shape[1], -1)).amax(1) for layer in out.attentions])  # [L, H, query, entry]
    later = torch.arange(len(ids)).unsqueeze(1) - torch.arange(len(ids)) >= gap
    target = share.masked_fill(~later, 0).amax(-2).clamp_min(FLOOR).log()
    return x[:, :, : -2 * gap].float(), target[:, :, : -2 * gap]


def fit(x: torch.Tensor, target: torch.Tensor, hidden: int, steps: int) -> dict[str, torch.Tensor]:
    """All layers and heads at once, by Adam on the mean squared error; inputs are standardised, and that is folded into the weights."""
    mean, std = x.mean(2, keepdim=True), x.std(2, keepdim=True).clamp_min(1e-6)
    x, centre = (x - mean) / std, target.mean(2)
    generator = torch.Generator().manual_seed(0)
    shape = (*x.shape[:2], hidden)
    w1 = (torch.randn(*shape, x.shape[-1], generator=generator) * (2 / x.shape[-1]) ** 0.5).requires_grad_()
    b1, w2 = torch.zeros(shape, requires_grad=True), (torch.randn(shape, generator=generator) * hidden**-0.5).requires_grad_()
    optimizer = torch.optim.Adam([w1, b1, w2], lr=5e-3)
    for _ in range(steps):
        batch = torch.randint(x.shape[2], (512,), generator=generator)
        loss = F.mse_loss(mlp_scores(x[:, :, batch], w1, b1, w2, centre), target[:, :, batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scaled = w1.detach() / std
    return {
        "w1": scaled,
        "b1": b1.detach() - torch.einsum("lhnw,lhw->lhn", scaled, mean.squeeze(2)),
        "w2": w2.detach(),
        "b2": centre,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--model", default=str(bundled.model_path()))
    parser.add_argument("--text", help="file to cut windows from (default: the bundled text)")
    parser.add_argument("--windows", type=int, default=24, help="the last quarter of them only tests the fit")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--gap", type=int, default=16, help="queries nearer than that find an entry in the recent window anyway")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--facts", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    text = Path(args.text).read_text(encoding="utf-8") if args.text else bundled.evaluation_text()
    data = [entries(model, ids, args.gap) for ids in windows(Prose(tokenizer, text), args.windows, args.context, args.facts)]
    kept = max(1, len(data) * 3 // 4)
    x, target = (torch.cat(part, 2) for part in zip(*data[:kept], strict=True))
    weights = fit(x, target, args.hidden, args.steps)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, args.output)
    test_x, test_target = (torch.cat(part, 2) for part in zip(*data[kept:] or data, strict=True))
    left = (mlp_scores(test_x, **weights) - test_target).square().mean(-1) / test_target.var(-1)
    print(
        f"wrote {args.output}: w1 {tuple(weights['w1'].shape)}, fitted on {x.shape[2]} entries; variance explained on {test_x.shape[2]} "
        f"others, by layer: {', '.join(f'{1 - float(part):.2f}' for part in left.mean(-1))}"
    )


if __name__ == "__main__":
    main()
