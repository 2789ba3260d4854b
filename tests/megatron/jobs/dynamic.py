"""Dynamic batching over PiKV: requests that arrive, pause, are evicted and go, each rank its own. Arguments: layouts."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVDynamicInferenceContext, cpu_compat, disable_pikv, enable_pikv
from tests.dist.jobs.report import Report
from tests.megatron import documented, hosts
from tests.megatron.layouts import each_layout
from tests.megatron.models import latent_config, tiny_config, tiny_model, tokens
from tests.megatron.runs import assert_conserved, full_forward, refused
from tests.megatron.serving import Log, Request, random_requests, reference_flash_decode, serve

LONGEST, BLOCK = 300, 16
MAIN = "1,2,1"
CHUNKED, SHARED, EVICTED = "chunked prefill", "a KV head that peers share", "evicted requests that start again"
LATENT, YARN = "MLA, chunked prefill", "MLA with YaRN, ids true"
ON_PEERS = (CHUNKED, SHARED, EVICTED, LATENT)  # also where the expert group is the tensor-parallel peers


def options(config, blocks: int, paused: int, **more) -> dict:
    """Arguments of DynamicInferenceContext for a buffer of so many blocks, some of them for paused requests."""
    limits = dict(max_sequence_length=LONGEST + 20, block_size_tokens=BLOCK, max_requests=8, max_tokens=1024)
    return hosts.dynamic_arguments(config, blocks=blocks, paused=paused, **limits, **more)


def suspendable(config) -> dict:
    return options(config, 20, 6, **(dict(kv_cache_management_mode="recompute") if hosts.takes_configs() else {}))


def worst_difference(model, requests: list[Request]) -> float:
    """Against each request alone, in one full forward of its prompt and answer: greedy tokens must be the same ones."""
    worst, rounds = 0.0, torch.tensor([len(requests)])
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
    for _ in range(int(rounds) - len(requests)):  # expert-parallel ranks run the same number of forwards
        full_forward(model, tokens(1, 1, seed=0))
    for request in requests:
        assert len(request.generated) == request.num_tokens
        alone = full_forward(model, torch.tensor([request.prompt + request.generated]))[0, len(request.prompt) - 1 : -1]
        worst = max(worst, (alone - torch.stack(request.logits)).abs().max().item())
        assert alone.argmax(-1).tolist() == request.generated, f"request {request.number}: {request.generated}"
    return worst


def run(model, requests: list[Request], *, blocks=60, paused=24, config=None, **how) -> tuple[PiKVDynamicInferenceContext, Log, int]:
    context = PiKVDynamicInferenceContext(model=model, config={"page_size": 4} | (config or {}), **options(model.config, blocks, paused))
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, context.stats()["kv_bytes_allocated"])

    with context.serving():
        log = serve(model, context, requests, group=context.core.exchange.group, each_step=watch, **how)
    return context, log, most


def own_requests(total: int, longest: int, seed: int) -> list[Request]:
    """Uneven shares, so that one rank is done long before the other; tensor-parallel peers have the same."""
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = total if dp_size == 1 else [total * 13 // 20, total - total * 13 // 20][dp_rank]
    return random_requests(share, longest, seed=seed + dp_rank)


def check_requests(report: Report, layout: str, model) -> None:
    group = parallel_state.get_expert_model_parallel_group()
    expected, own = own_requests(20, LONGEST, seed=3), own_requests(20, LONGEST, seed=3)
    with reference_flash_decode():
        dense = DynamicInferenceContext(**options(model.config, 60, 24))
        dense_log = serve(model, dense, expected, group=group)
    enable_pikv(model)
    with report.check(f"{layout} 20 requests of 1 to {LONGEST} tokens") as row:
        context, log, most = run(model, own)
        row |= {"log": vars(log), "most": most, "budget": dense.memory_buffer.nbytes, "stats": context.stats()}
        assert context.memory_buffer.numel() == 0
        assert log == dense_log, f"requests were paused or evicted at other steps: {log} and {dense_log}"
        assert [r.generated for r in own] == [r.generated for r in expected]
        assert_conserved(context)
        sums = torch.tensor([most, dense.memory_buffer.nbytes])
        dist.all_reduce(sums)
        assert sums[0] <= 1.25 * sums[1], f"{sums[0]} bytes were allocated, the blocks of all ranks have {sums[1]}"
        context.free()
        assert context.stats()["kv_bytes_allocated"] < most / 50, "a slot per layer stays"
    disable_pikv(model)
    with report.check(f"{layout} every request as if it were alone") as row:
        row["difference"] = worst_difference(model, own)
        assert row["difference"] <= 1e-5, row
    dist.barrier()


def check_variants(report: Report, layout: str) -> None:
    variants = {
        CHUNKED: (dict(), {}, dict(chunk=24)),
        "ids true": (dict(), {"storage": {"expert_ids": "true"}}, {}),
        "ids lookahead": (dict(), {"storage": {"expert_ids": "lookahead"}}, {}),
        "sliding window, ids true, chunked prefill": (dict(window_size=(9, 0)), {"storage": {"expert_ids": "true"}}, dict(chunk=24)),
        SHARED: (dict(num_query_groups=1), {}, {}),
        EVICTED: (dict(), {}, dict(blocks=10, paused=1)),
        LATENT: (dict(), {}, dict(chunk=24)),
        YARN: (dict(rope_type="yarn"), {"storage": {"expert_ids": "true"}}, {}),
    }
    for name, (changes, config, how) in variants.items():
        if layout != MAIN and name not in ON_PEERS:
            continue
        model = tiny_model((latent_config if name in (LATENT, YARN) else tiny_config)(**changes))
        enable_pikv(model)
        requests = own_requests(8, 60, seed=11)
        if name == EVICTED:  # all of them fill their block at about the same time, and want another one
            requests = [Request(i, 0, tokens(1, 12 + i % 4, seed=i)[0].tolist(), 20) for i in range(8)]
        with report.check(f"{layout} {name}") as row:
            context, log, _ = run(model, requests, **{"blocks": 20, "paused": 6, "config": config} | how)
            row |= {"stats": context.stats(), "log": vars(log)}
            disable_pikv(model)
            row["difference"] = worst_difference(model, requests)
            assert row["difference"] <= 1e-5, row
        dist.barrier()


def check_limits(report: Report, layout: str, model) -> None:
    given = options(model.config, 20, 6)
    with report.check(f"{layout} a forward without a context is the host's own unless serving"):
        ids = tokens(2, 9, seed=8)
        before = full_forward(model, ids)
        enable_pikv(model)
        PiKVDynamicInferenceContext(model=model, **given)
        assert torch.equal(full_forward(model, ids), before)
    with report.check(f"{layout} the documented lines"):
        own, group = own_requests(3, 9, seed=5), parallel_state.get_expert_model_parallel_group()
        documented.run(
            "context.serving()", model=model, arguments=given, run_engine=lambda context: serve(model, context, own, group=group)
        )
        assert all(len(request.generated) == request.num_tokens for request in own)
    with report.check(f"{layout} refusals"):
        unwanted = dict(num_cuda_graphs=1, use_flashinfer_fused_rope=True)
        own = dict(enable_prefix_caching=True, num_speculative_tokens=2, kv_cache_management_mode="offload")
        for name, value in (unwanted | (own if hosts.takes_configs() else dict(unified_memory_level=1, offload_kv_cache=True))).items():
            changed = options(model.config, 20, 6, **{name: value})
            refused(UnsupportedError, name, lambda changed=changed: PiKVDynamicInferenceContext(model=model, **changed))
        if not hosts.takes_configs():
            latents = dict(block_size_tokens=64, cache_mla_latent=True, kv_lora_rank=16, qk_pos_emb_head_dim=8)
            refused(UnsupportedError, "no multi-latent attention", lambda: PiKVDynamicInferenceContext(model=model, **given | latents))
        with reference_flash_decode():
            refused(
                UnsupportedError,
                "DynamicInferenceContext",
                lambda: serve(model, DynamicInferenceContext(**given), own_requests(2, 9, seed=1)),
            )
        suspended = PiKVDynamicInferenceContext(model=model, **suspendable(model.config))
        suspended.add_misses(0, torch.ones(8))
        if hosts.takes_configs():
            suspended.deallocate_inference_state_buffers()
            assert not hasattr(suspended, "memory_buffer")
            suspended.reinitialize_inference_state_buffers()
        else:
            suspended.deallocate_all_tensors()
            suspended.allocate_all_tensors(is_init=False)
        assert suspended.memory_buffer.numel() == 0 and suspended._misses[0].sum() == 8
        disable_pikv(model)
        refused(UnsupportedError, "call enable_pikv(model) first", lambda: PiKVDynamicInferenceContext(model=model, **given))
        enable_pikv(model)
        context = PiKVDynamicInferenceContext(model=model, **given)
        disable_pikv(model)
        refused(UnsupportedError, "layer 1 appends to the block buffer", lambda: serve(model, context, own_requests(2, 9, seed=1)))
    with report.check(f"{layout} tokens that were never run"):
        enable_pikv(model)
        context = PiKVDynamicInferenceContext(model=model, **given)
        context.add_request(Request(number=0, arrival=0, prompt=tokens(1, 20, seed=1)[0].tolist(), num_tokens=2).as_megatron())
        context.request_kv_length_offsets[0] = 5
        context.initialize_attention_state()
        refused(UnsupportedError, "continues at token 5, but 0 of its tokens are stored", lambda: forward(model, context))
        refused(UnsupportedError, "the context has laid out", lambda: forward(model, context, cut=3))
    disable_pikv(model)
    dist.barrier()


def forward(model, context, cut: int = 0) -> torch.Tensor:
    ids, at = context.current_input_and_position_ids()
    keep = ids.shape[1] - cut
    with torch.no_grad():
        return model(ids[:, :keep], at[:, :keep], None, inference_context=context, runtime_gather_output=True)


@cpu_compat.cuda_literals_on_cpu()
def check_layout(report: Report, layout: str) -> None:
    model = tiny_model(tiny_config(), max_sequence_length=LONGEST + 20)
    check_variants(report, layout)
    if layout == MAIN:
        check_requests(report, layout, model)
        check_limits(report, layout, model)


if __name__ == "__main__":
    each_layout(check_layout)
