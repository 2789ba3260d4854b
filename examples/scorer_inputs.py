"""Which inputs tell what a rehearsal will look at: an entry's key and value, or the hidden state before the layer's attention.

    python examples/scorer_inputs.py [--prompts 24] [--steps 500] [--seeds 0,1,2] [--json FILE]

The same network (32 hidden units per layer and kv head, standardised inputs) is fitted to the same rehearsals of the bundled model; the
rows are of prompts that were not trained on: correlation of log shares, and the part of the largest shares that the best quarter of the
pages holds, as the part eviction_scorer counts it.
"""

import argparse
import time

import torch
from torch.nn import functional as F

from pikv_ds import bundled
from pikv_ds.adapters.hf.record import Recorder
from pikv_ds.launch.output import print_table, write_json
from pikv_ds.launch.training.data import repeated, windows_of
from pikv_ds.policies.entry_scorer import page_scores
from pikv_ds.training.rehearsal import page_peaks

PAGE, HIDDEN, FLOOR, QUARTER = 8, 32, 1e-6, 0.25
KINDS = ("kv", "hidden", "hidden+position", "kv+hidden")


def recorded(recorder: Recorder, index: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs by name [L, H, C, PAGE, W], and log of the pages' largest shares [L, H, C]."""
    window = recorder[index]
    read = int((~window.question).sum())
    count, asking = read // PAGE, window.question.nonzero().squeeze(-1)
    heads = window.layers[0].k.shape[1]
    paged = lambda x: x[: count * PAGE].transpose(0, 1).unflatten(1, (count, PAGE))  # noqa: E731
    kv = torch.stack([paged(torch.cat([layer.k, layer.v], -1)) for layer in window.layers])
    hidden = torch.stack([paged(layer.hidden.unsqueeze(1).expand(-1, heads, -1)) for layer in window.layers])
    position = torch.arange(1.0, count * PAGE + 1).log().view(1, 1, count, PAGE, 1).expand(*kv.shape[:4], 1)
    peaks = torch.stack([page_peaks(layer, asking, 0, count, PAGE) for layer in window.layers])
    found = {"kv": kv, "hidden": hidden, "hidden+position": torch.cat([hidden, position], -1), "kv+hidden": torch.cat([kv, hidden], -1)}
    return found, peaks.clamp_min(FLOOR).log()


def said(x: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
    hidden = torch.relu(torch.einsum("lhcpw,lhnw->lhcpn", x, w[0]) + w[1][:, :, None, None])
    return page_scores(torch.einsum("lhcpn,lhn->lhcp", hidden, w[2]) + w[3][:, :, None, None])


def fit(x: torch.Tensor, target: torch.Tensor, steps: int, seed: int) -> list[torch.Tensor]:
    draw, (layers, heads, _, _, width) = torch.Generator().manual_seed(seed), x.shape
    w = [torch.randn(layers, heads, HIDDEN, width, generator=draw) * (2 / width) ** 0.5, torch.zeros(layers, heads, HIDDEN)]
    w += [torch.randn(layers, heads, HIDDEN, generator=draw) * HIDDEN**-0.5, torch.full((layers, heads), -4.0)]
    optimizer = torch.optim.AdamW([one.requires_grad_() for one in w], lr=5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pages = torch.randint(x.shape[2], (256,), generator=draw)
        loss = F.mse_loss(said(x[:, :, pages], w), target[:, :, pages])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return [one.detach() for one in w]


def judged(own: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """own, target [L, H, C] of one window."""
    alike = [torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(own.flatten(0, 1), target.flatten(0, 1), strict=True)]
    held = []
    for a, b in zip(own.flatten(1), target.flatten(1).exp(), strict=True):
        best = int(QUARTER * len(b))
        held.append(b[a.topk(best).indices].sum() / b.topk(best).values.sum())
    return float(torch.stack(alike).mean()), float(torch.stack(held).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    model, tokenizer = bundled.load()
    sides = (repeated(side) for side in windows_of(tokenizer, bundled.calibration_text(), 1024, 8, args.prompts, 0))
    train, held = ([recorded(recorder, i) for i in range(len(recorder))] for recorder in (Recorder(model, *side) for side in sides))
    target, rows = torch.cat([t for _, t in train], 2), []
    for kind in KINDS:
        x = torch.cat([found[kind] for found, _ in train], 2)
        mean, std = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True).clamp_min(1e-6)
        for seed in map(int, args.seeds.split(",")):
            begun = time.process_time()
            w = fit((x - mean) / std, target, args.steps, seed)
            seconds = time.process_time() - begun
            found = [judged(said((inputs[kind] - mean) / std, w), t) for inputs, t in held]
            alike, held_part = (sum(one) / len(one) for one in zip(*found, strict=True))
            fitted = float((said((train[0][0][kind] - mean) / std, w) - train[0][1]).square().mean())
            rows.append({"inputs": kind, "width": x.shape[-1], "seed": seed, "correlation": round(alike, 4), "held": round(held_part, 4)})
            rows[-1] |= {"fitted_error": round(fitted, 4), "cpu_s": round(seconds, 1)}
            print(rows[-1], flush=True)
    print_table(f"{len(train)} windows to fit, {len(held)} held out", rows)
    write_json(args.json, f"python examples/scorer_inputs.py --prompts {args.prompts} --steps {args.steps} --seeds {args.seeds}", rows)


if __name__ == "__main__":
    main()
