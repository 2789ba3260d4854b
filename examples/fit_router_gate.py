"""Fit the gate of the "learned" router: from a query, the share of its attention that lies on each shard.

    python examples/fit_router_gate.py router_gate.safetensors [--model PATH] [--shards 4] [--windows 8]

Use it with "storage": {"num_shards": 4}, "routing": {"method": "learned", "path": "router_gate.safetensors"}. The homes of the entries are
those of a cache with that many shards; sinks and recent tokens, which every query reads, are left out. Softmax regression per layer.
"""

import argparse

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_utils

import pikv_ds
from pikv_ds import bundled
from pikv_ds.cache.inspect import CacheProbe

SINKS, RECENT, CHUNK = 4, 16, 32


@torch.no_grad()
def queries_and_keys(model, ids: Tensor) -> list[tuple[Tensor, Tensor, float]]:
    """What reaches the attention of each layer: q [Hq, T, D], k [H, T, D] after RoPE, and the softmax scale."""
    seen = []

    def record(module, query, key, value, mask, scaling=None, **kwargs):
        seen.append((query[0], key[0], scaling))
        return modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **kwargs)

    modeling_utils.ALL_ATTENTION_FUNCTIONS.register("record", record)
    before = model.config._attn_implementation
    model.set_attn_implementation("record")
    model(ids)
    model.set_attn_implementation(before)
    return seen


@torch.no_grad()
def homes(model, ids: Tensor, shards: int) -> list[Tensor]:
    """The shard of every token in each layer of a cache, [T] int64."""
    with pikv_ds.attach(model, {"storage": {"num_shards": shards}}) as cache:
        for part in ids.split(CHUNK, 1):
            model(part, cache=cache, use_cache=True)
        probe = CacheProbe(cache.core)
        return [probe.homes(layer)[0] for layer in range(probe.num_layers)]


def shares(q: Tensor, k: Tensor, scale: float, home: Tensor, shards: int) -> Tensor:
    """[T, shards]: attention of each query to the entries of each shard, mean over heads, sinks and recent entries left out."""
    groups, length = q.shape[0] // k.shape[0], q.shape[1]
    score = scale * q @ k.repeat_interleave(groups, 0).transpose(1, 2)
    position = torch.arange(length)
    optional = (position >= SINKS) & (position.unsqueeze(1) - position > RECENT)
    visible = position <= position.unsqueeze(1)
    mass = torch.softmax(score.masked_fill(~visible, -torch.inf), -1).mean(0) * optional
    return mass @ torch.nn.functional.one_hot(home, shards).float()


def fit(queries: Tensor, target: Tensor, steps: int = 300) -> Tensor:
    """W [shards, width] so that softmax(W q) follows the target, each query weighted by what there is to find."""
    weight = torch.zeros(target.shape[1], queries.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01, weight_decay=1e-4)
    for _ in range(steps):
        loss = -(target * torch.log_softmax(queries @ weight.T, -1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--model", default=str(bundled.model_path()))
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = torch.tensor(tokenizer(bundled.calibration_text(), add_special_tokens=False, verbose=False)["input_ids"])
    queries, targets = [], []
    for ids in text.split(args.context)[: args.windows]:
        at = homes(model, ids.unsqueeze(0), args.shards)
        found = queries_and_keys(model, ids.unsqueeze(0))
        queries.append([q.transpose(0, 1).flatten(1) for q, _, _ in found])
        targets.append([shares(*one, home, args.shards) for one, home in zip(found, at, strict=True)])
    gates, kept = [], []
    for layer_queries, layer_targets in zip(zip(*queries, strict=True), zip(*targets, strict=True), strict=True):
        q, target = torch.cat(layer_queries), torch.cat(layer_targets)
        gates.append(fit(q, target))
        chosen = target.gather(1, (q @ gates[-1].T).argmax(-1, keepdim=True))
        kept.append(round((chosen.sum() / target.sum()).item(), 3))
    save_file({"gate": torch.stack(gates)}, args.output)
    print(
        f"wrote {args.output}: gate {tuple(torch.stack(gates).shape)}; share of the attention in the first shard chosen, by layer: {kept}"
    )


if __name__ == "__main__":
    main()
