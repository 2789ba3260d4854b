"""Folded codecs over process groups: at full rank the tokens of the ordinary cache, whoever stores the coefficients; bytes on the wire.

args: folder for a calibration of each rank's own.
"""

import sys

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.hf.anatomy import find_attentions
from pikv_ds.adapters.hf.fingerprint import key_norms
from pikv_ds.adapters.hf.model_spec import read_model_spec
from pikv_ds.adapters.hf.rotation import inv_freq_of
from pikv_ds.cache.stats import decode_bytes_sent
from tests.calibrations import random_calibration
from tests.dist.jobs.evict import ROOMY, held
from tests.dist.jobs.exact import assert_conserved, assert_same, generate, generate_sharded
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model

KEPT_BY = ["h2o", "quest"]


def check_exact(report: Report, model, group, name: str, requests: str, ids: torch.Tensor, block: dict, **options) -> None:
    with report.check(f"{name} {requests}"):
        config = {"page_size": 4, **block, "storage": {"requests": requests, "num_shards": 4, **block.get("storage", {})}}
        run = generate_sharded(model, ids, new_tokens=16, group=group, config=config, **options)
        assert_same(run, generate(model, ids, new_tokens=16, **options), 2e-5)
        assert_conserved(run.stats, group)


def check_wire(report: Report, model, group, requests: str, ids: torch.Tensor, compression: dict) -> None:
    """A record carries coefficients: the formula with the stored geometry."""
    with report.check(f"bytes {requests}") as row, torch.no_grad():
        config = {"compression": {**compression, "rank": 8}, "storage": {"requests": requests}}
        with pikv_ds.attach(model, config, group) as cache:
            token = model(ids).logits[:, -1:].argmax(-1)
            model(token, past_key_values=cache)  # sizes settle
            before = cache.stats()["exchange_bytes_sent"]
            model(token, past_key_values=cache)
            sent = cache.stats()["exchange_bytes_sent"] - before
            stored = [cache.core.codec.pool(spec, cache.core.page_size, torch.float32).stored for spec in cache.core.layers]
        rows = [len(ids)] * dist.get_world_size()
        row["sent"] = sent
        assert sent == decode_bytes_sent(requests, rows, dist.get_rank(), 4, stored, 4) and stored[0].k_dim == 8, sent


def check_latent(report: Report, model, group, codec: str, requests: str, ids: torch.Tensor) -> None:
    """Latents in records with a wide rotary part: what a rank alone gives with as many shards. Prompts fill groups of 32 in each."""
    with report.check(f"deepseek_v3 {codec} {requests}") as row:
        block = {"compression": {"method": codec} | ({} if codec == "fp8_e4m3" else {"group": 32}), "storage": {"num_shards": 2}}
        alone = generate_sharded(model, ids, new_tokens=16, config=block)
        run = generate_sharded(model, ids, new_tokens=16, group=group, config=block | {"storage": {"num_shards": 2, "requests": requests}})
        row["lossy"] = run.difference(generate(model, ids, new_tokens=16))
        assert_same(run, alone, 2e-5)
        assert_conserved(run.stats, group)
        assert row["lossy"] > 1e-4, "the store was not read"


def check_kept(report: Report, model, group, method: str, requests: str, ids: torch.Tensor, compression: dict) -> None:
    """Coefficients of un-rotated keys over the group: kept is what one rank keeps of raw keys."""
    with report.check(f"kept by {method} {requests}"):
        several = held(model, ids, group, method, requests=requests, storage=ROOMY, compression=compression)
        alone = held(model, ids, None, method, requests="auto", storage=ROOMY)
        rows = slice(dist.get_rank(), dist.get_rank() + 1) if requests == "distinct" else slice(None)
        assert several["tokens"] == alone["tokens"]
        assert [layer[rows] for layer in several["kept"]] == alone["kept"]


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    group, rank = dist.new_group(), dist.get_rank()
    same, own = prompt(19, seed=3, batch=2), prompt(11 + 6 * rank, seed=30 + rank, batch=2)
    for family in ("qwen3_moe", "gpt_oss"):
        model = tiny_model(family)
        specs = read_model_spec(model.config)
        path = f"{sys.argv[1]}/{family}.{rank}.safetensors"
        norms = [key_norms(a, s.num_kv_heads) for a, s in zip(find_attentions(model), specs, strict=True)]
        rotations = [inv_freq_of(model.config, s) for s in specs] if family == "qwen3_moe" else None  # gpt_oss has another kind
        random_calibration(specs, norms, rotations).save(path)
        svd = {"compression": {"method": "svd", "rank": 16, "fit_tokens": 64}}  # requests double while they are decoded
        for requests, ids in (("replicated", same), ("distinct", own)):
            check_exact(report, model, group, f"{family} svd", requests, ids, svd)
            window = {"compression": svd["compression"] | {"raw_sink_tokens": 2, "raw_recent_tokens": 5}}
            check_exact(report, model, group, f"{family} svd window", requests, ids, window)
        compression = {"method": "lora_plus", "rank": 16, "calibration": path, "rotate": "hadamard"}
        for requests, ids in (("replicated", same), ("distinct", own)):
            check_exact(report, model, group, family, requests, ids, {"compression": compression})
            if family == "qwen3_moe":
                true = {"compression": compression, "storage": {"expert_ids": "true"}}
                check_exact(report, model, group, f"{family} ids true", requests, ids, true)
                check_exact(report, model, group, f"{family} beams", requests, ids, {"compression": compression}, num_beams=2)
                pre = compression | {"rope": "pre"}
                check_exact(report, model, group, f"{family} rope pre", requests, ids, {"compression": pre})
                longer = prompt(60, seed=5, batch=2) if requests == "replicated" else prompt(40 + 10 * rank, seed=6 + rank, batch=1)
                for method in KEPT_BY:
                    check_kept(report, model, group, method, requests, longer, pre)
                check_wire(report, model, group, requests, ids[:, :11], compression | {"rotate": "none"})
    latent = tiny_model("deepseek_v3", num_experts_per_tok=8, topk_group=2)  # all experts: what is rounded changes no choice of theirs
    for codec in ("int8", "int4", "fp8_e4m3"):
        check_latent(report, latent, group, codec, "replicated", prompt(90, seed=3, batch=2))
        check_latent(report, latent, group, codec, "distinct", prompt(80 + 9 * rank, seed=30 + rank, batch=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
