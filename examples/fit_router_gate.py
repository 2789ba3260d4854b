"""Fit the gate of the router `learned`: from a query, the attention that each shard holds for it.

    python examples/fit_router_gate.py gate.safetensors [--model PATH] [--text FILE] [--shards 4] [--windows 24]

Data: the model reads windows of text through the cache, all shards; what each shard holds of every query's attention (lse of the pages,
mean over heads) is the target of a linear gate per layer, by cross-entropy. A gate fits one placement and one number of shards. Use it
with "storage": {"num_shards": 4}, "routing": {"method": "learned", "path": "gate.safetensors"}.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import pikv_ds
from pikv_ds import bundled
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("record_shares")
class RecordShares(ShardRouter):
    """Reads every shard and keeps (q, share of the attention that lies in each shard, entries of each shard) of all queries, by layer."""

    wants_page_lse = True

    def __init__(self) -> None:
        super().__init__(top_k=1 << 20)
        self.rows: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def logits(self, asked) -> torch.Tensor:
        return torch.zeros(len(asked.positions), self.counts[asked.layer].shape[1])

    def answered(self, asked, page_list, page_lse) -> None:
        share = page_lse.logsumexp(-1).unflatten(0, asked.visible.shape[:2]).softmax(1).mean(-1)  # [Q, S]
        self.rows.append((asked.layer, asked.q.flatten(1).clone(), share, self.counts[asked.layer][asked.row_of_query()].clone()))


@torch.no_grad()
def collect(model, windows: torch.Tensor, num_shards: int, chunk: int = 32) -> list[list[torch.Tensor]]:
    """Per layer: q [n, Hq * D], share [n, S], entries [n, S]."""
    block = {
        "page_size": 16,
        "storage": {"num_shards": num_shards},
        "routing": {"method": "record_shares", "sink_tokens": 0, "recent_tokens": 0},
    }
    with pikv_ds.attach(model, block) as cache:
        for start in range(0, windows.shape[1], chunk):
            model(windows[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)
        rows = cache.core.selection.router.rows
    layers = sorted({row[0] for row in rows})
    return [[torch.cat(part) for part in zip(*(row[1:] for row in rows if row[0] == layer), strict=True)] for layer in layers]


def fit(q: torch.Tensor, share: torch.Tensor, steps: int = 400) -> torch.Tensor:
    """[S, width]: softmax regression without a bias on the shares, full batches, Adam, some weight decay."""
    scale = q.std().clamp_min(1e-6)
    gate = torch.zeros(share.shape[1], q.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([gate], lr=2e-2, weight_decay=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(q / scale @ gate.T, share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gate.detach() / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--model", default=str(bundled.model_path()))
    parser.add_argument("--text", help="file to cut windows from (default: the bundled text)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--windows", type=int, default=24, help="the last quarter of them only tests the fit")
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = Path(args.text).read_text(encoding="utf-8") if args.text else bundled.evaluation_text()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = [round(i * (len(ids) - args.context) / args.windows) for i in range(args.windows)]
    windows = torch.tensor([ids[start : start + args.context] for start in starts])
    kept = max(1, args.windows * 3 // 4)
    gates, found = [], []
    tested = collect(model, windows[kept:] if kept < len(windows) else windows, args.shards)
    for (q, share, _), (test_q, test_share, held) in zip(collect(model, windows[:kept], args.shards), tested, strict=True):
        gates.append(fit(q, share))
        best = (test_q @ gates[-1].T).masked_fill(held == 0, -torch.inf).argmax(-1, keepdim=True)
        entries = held / held.sum(-1, keepdim=True)
        found.append(tuple(round(float(x.gather(1, best).mean()), 3) for x in (test_share, entries)))
    save_file({"gate": torch.stack(gates)}, args.output)
    print(
        f"wrote {args.output}: gate {tuple(torch.stack(gates).shape)}; attention and entries of the best shard on other text, by layer: "
        f"{found}"
    )


if __name__ == "__main__":
    main()
