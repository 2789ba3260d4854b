"""The bundled trained model: exact on every rank count, bytes near 1 / G, collectives counted, bytes on the wire as the formula says."""

from statistics import median

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds import bundled
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import decode_bytes_sent
from pikv_ds.codecs import CODECS
from pikv_ds.pages import estimate
from tests.bf16_error import PREFILL, STEPS, fixed_routing, forced_logits, recorded_routing, rms
from tests.dist.jobs.exact import assert_conserved, assert_same, counted_collectives, generate, generate_sharded
from tests.dist.jobs.report import Report
from tests.long_form import LONG

TOLERANCE = 5e-5
NEW_TOKENS = 64
WINDOWS = 16 if LONG else 5  # of text, for the error of bf16, a median


def passkey(tokenizer, length: int, seed: int) -> tuple[torch.Tensor, str]:
    ids, answer = bundled.passkey_prompt(tokenizer, length, seed=seed, depth=0.3)
    return torch.tensor([ids]), answer


def byte_bound(dense: float, cache, rows: int) -> float:
    """1.25 x 1.1 x the dense share, plus one open page per request, layer and shard."""
    probe = CacheProbe(cache)
    open_pages = rows * len(probe.local_shards) * sum(fmt.record_bytes for fmt in probe.formats)
    return 1.25 * 1.1 * dense + open_pages


def check_exact(report: Report, model, tokenizer, group, requests: str, length: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    with report.check(f"{requests} {length} tokens") as row:
        own = length if requests == "replicated" else (length if rank == 0 else 160 + 30 * rank)
        ids, answer = passkey(tokenizer, own, seed=1 if requests == "replicated" else 1 + rank)
        reference = generate(model, ids, new_tokens=NEW_TOKENS)
        with pikv_ds.attach(model, {"storage": {"requests": requests}}, group) as cache:
            run = generate(model, ids, new_tokens=NEW_TOKENS)
            stats = cache.stats()
            assert_same(run, reference, TOLERANCE)
            assert_conserved(stats, group)
            dense = torch.tensor(float(stats["kv_bytes_dense"]))
            dist.all_reduce(dense, group=group)
            share = dense.item() / size / (size if requests == "replicated" else 1)
            rows = 1 if requests == "replicated" else size
            row |= {"allocated": stats["kv_bytes_allocated"], "dense": stats["kv_bytes_dense"], "spilled": stats["spilled"]}
            assert stats["kv_bytes_allocated"] <= byte_bound(share, cache.core, rows), (stats, share)
            assert stats["kv_bytes_allocated"] == CacheProbe(cache.core).bytes
        assert answer in tokenizer.decode(run.tokens[0, own : own + 8]), tokenizer.decode(run.tokens[0, own:])


def check_plan(report: Report, model, tokenizer, group, requests: str) -> None:
    """What `pikv plan` says beforehand, against what the store then allocates on the fullest rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with report.check(f"plan against the store, {requests}") as row, torch.no_grad():
        lengths = [900] * size if requests == "replicated" else [900 - 150 * r for r in range(size)]
        ids, _ = passkey(tokenizer, lengths[rank], seed=3 if requests == "replicated" else 3 + rank)
        with pikv_ds.attach(model, {"storage": {"requests": requests}}, group) as cache:
            model(ids)
            allocated, dense = torch.tensor(cache.stats()["kv_bytes_allocated"]), cache.stats()["kv_bytes_dense"]
            layers, page_size = cache.core.layers, cache.core.page_size
            slab = sum(fmt.record_bytes for fmt in CacheProbe(cache.core).formats)
        dist.all_reduce(allocated, op=dist.ReduceOp.MAX, group=group)
        stored = lengths[:1] if requests == "replicated" else lengths
        planned = estimate.pikv_bytes(layers, stored, ranks=size, codec=CODECS.build("none"), page_size=page_size, dtype=torch.float32)
        row |= {"allocated": int(allocated), "balanced": planned.balanced, "worst": planned.worst}
        assert dense == estimate.dense_bytes(layers, [lengths[rank]], 4)
        assert 0.95 * planned.balanced <= int(allocated) <= 1.125 * planned.worst + slab, row


def check_collectives(report: Report, model, group, requests: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    with report.check(f"collectives of a decode step, {requests}") as row, torch.no_grad():
        rows = [2] * size if requests == "replicated" else [1 + r for r in range(size)]
        ids = torch.randint(3, 2000, (rows[rank], 40), generator=torch.Generator().manual_seed(0 if requests == "replicated" else rank))
        with pikv_ds.attach(model, {"storage": {"requests": requests}}, group) as cache:
            out = model(ids)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            for _ in range(3):
                sent, made = cache.stats()["exchange_bytes_sent"], cache.stats()["exchange_collectives"]
                with counted_collectives() as calls:
                    out = model(token, past_key_values=cache)
                layers = cache.core.layers
                per_layer = 0 if size == 1 else 1 if requests == "replicated" else 2
                stats = cache.stats()
                assert len(calls) == per_layer * len(layers) == stats["exchange_collectives"] - made, (len(calls), calls)
                formula = decode_bytes_sent("replicated" if size == 1 else requests, rows, rank, 8, layers, 4) if size > 1 else 0
                counted = sum(num_bytes for _, num_bytes in calls)
                assert counted == formula == stats["exchange_bytes_sent"] - sent, (counted, formula, stats["exchange_bytes_sent"] - sent)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            row |= {"collectives": len(calls), "bytes": counted}


def check_shards(report: Report, model, tokenizer, group) -> None:
    with report.check("four shards whatever the ranks"):
        ids, _ = passkey(tokenizer, 300, seed=9)
        reference = generate(model, ids, new_tokens=NEW_TOKENS)
        run = generate_sharded(model, ids, new_tokens=NEW_TOKENS, group=group, config={"storage": {"num_shards": 4}})
        assert_same(run, reference, TOLERANCE)


def check_bf16(report: Report, model, tokenizer, group) -> None:
    with report.check("bf16 error against fp32") as row:
        low = bundled.load(torch.bfloat16)[0]
        text = tokenizer(bundled.haystack(), add_special_tokens=False, verbose=False)["input_ids"]
        windows = [torch.tensor([text[i * 400 : i * 400 + PREFILL + STEPS]]) for i in range(WINDOWS)]
        own: list = [None] * WINDOWS  # what needs no cache, by the ranks in turn
        for i in range(dist.get_rank(), WINDOWS, dist.get_world_size()):
            record = []
            with recorded_routing(model, record):
                exact = forced_logits(model, windows[i])
            with fixed_routing(low, record):
                own[i] = record, exact, rms(forced_logits(low, windows[i]) - exact)
        ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        dense, sharded = [], []
        for i, ids in enumerate(windows):
            record, exact, error = ranks[i % len(ranks)][i]
            dense.append(error)
            with pikv_ds.attach(low, {}, group), fixed_routing(low, record):
                sharded.append(rms(forced_logits(low, ids) - exact))
        row |= {"windows": WINDOWS, "dense": median(dense), "sharded": median(sharded)}
        assert 0 < row["sharded"] <= 1.1 * row["dense"], row


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    group = dist.new_group()
    model, tokenizer = bundled.load(torch.float32)
    for requests in ("replicated", "distinct"):
        check_exact(report, model, tokenizer, group, requests, 1100)
        check_collectives(report, model, group, requests)
        check_plan(report, model, tokenizer, group, requests)
    check_shards(report, model, tokenizer, group)
    check_bf16(report, model, tokenizer, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
