"""What `pikv plan --simulate` counts against what the bundled model's caches hold and send: entries, pages, bytes of a decode step."""

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds import bundled
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.launch.simulate.interconnects import INTERCONNECTS
from pikv_ds.launch.simulate.strategies import Job, kv_bytes, simulate
from pikv_ds.launch.simulate.traces import Trace, recorded
from tests.dist.jobs.report import Report

LENGTHS = (700, 190, 420, 333)  # distinct: of the ranks; replicated: the first two are one batch's, padded on the left


def prompts(tokenizer, count: int) -> list[torch.Tensor]:
    ids = tokenizer(bundled.haystack(), add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"]
    return [ids[:, 900 * i : 900 * i + LENGTHS[i]] for i in range(count)]


def check(report: Report, model, tokenizer, group, requests: str, placement: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    with report.check(f"{requests} {placement}") as row, torch.no_grad():
        texts = prompts(tokenizer, 2 if requests == "replicated" else size)
        found = [recorded(model, text, "prompt").ids for text in texts]
        trace = Trace(ids=torch.cat(found, 1), num_experts=model.config.num_experts, name="prompts")
        own = texts if requests == "replicated" else texts[rank : rank + 1]
        width = max(text.shape[1] for text in own)
        ids = torch.cat([torch.nn.functional.pad(text, (width - text.shape[1], 0)) for text in own])
        mask = torch.stack([torch.arange(width) >= width - text.shape[1] for text in own]).long()
        with pikv_ds.attach(model, {"storage": {"requests": requests, "placement": placement}}, group) as cache:
            out = model(ids, attention_mask=mask)
            probe, layers = CacheProbe(cache.core), cache.core.layers
            lengths = [[text.shape[1] for text in texts]] * size if requests == "replicated" else [[text.shape[1]] for text in texts]
            job = Job(
                layers=layers, num_q_heads=model.config.num_attention_heads, itemsize=4, page_size=cache.core.page_size,
                record_bytes=[fmt.record_bytes for fmt in probe.formats], tail_bytes=[0] * len(layers), requests=requests, lengths=lengths,
            )  # fmt: skip
            held, entries = kv_bytes(placement, job, trace)
            pools = [probe.near_pool(i) for i in range(len(layers))]
            used = [int((pool.page_table >= 0).sum()) * pool.records.shape[1] for pool in pools]
            assert used == held[:, rank].tolist(), (used, held[:, rank].tolist())
            assert cache.stats()["load_per_rank"] == entries.sum(0).tolist()
            sent = cache.stats()["exchange_bytes_sent"]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            model(out.logits[:, -1].argmax(-1, keepdim=True), attention_mask=mask, past_key_values=cache)
            sent = cache.stats()["exchange_bytes_sent"] - sent
            planned = simulate(placement, job, trace, INTERCONNECTS["h100-ndr"])
            assert sent == planned["wire_bytes"], (sent, planned["wire_bytes"])
            row |= {"kv_bytes": sum(used), "fullest": planned["kv_bytes_fullest"], "wire_bytes": sent}


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, tokenizer = bundled.load(torch.float32)
    group = dist.new_group()
    for requests in ("replicated", "distinct"):
        for placement in ("experts", "position"):
            check(report, model, tokenizer, group, requests, placement)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
