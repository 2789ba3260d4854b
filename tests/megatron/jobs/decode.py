"""Decoding through PiKVInferenceContext against StaticInferenceContext, on several layouts of ranks: prompt pieces, then decode steps.

Arguments: tp,ep,etp of each layout. Batch of 3 with prompts of 12, 15 and 20 tokens. Experts are drawn per rank.
"""

import tempfile
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext

from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.codecs.rope import default_inv_freq
from pikv_ds.errors import ConfigError
from pikv_ds.megatron_patch import PiKVInferenceContext, enable_pikv
from pikv_ds.megatron_patch.layers import find_layers, key_norms, layer_spec_of
from tests.calibrations import random_calibration
from tests.dist.jobs.report import Report
from tests.held import held_bytes
from tests.long_form import LONG
from tests.megatron.layouts import each_layout
from tests.megatron.models import latent_config, tiny_config, tiny_model, tokens
from tests.megatron.runs import assert_conserved, decode, dense_is_forbidden, full_forward

ROWS, LONGEST_PROMPT = 3, 20
STEPS = 32 if LONG else 8  # 8 tokens per row: pages of 4 fill and others are opened
LENGTH = LONGEST_PROMPT + STEPS


def check_decode(report: Report, model, name: str, ids: torch.Tensor, pieces: list[int], reference: torch.Tensor, **storage) -> None:
    with report.check(name) as row:
        context = PiKVInferenceContext(ROWS, LENGTH, model=model, config={"page_size": 4, "storage": storage})
        with dense_is_forbidden():
            logits = decode(model, context, ids, pieces)
        row["difference"] = (logits - reference[: len(logits)]).abs().max().item()
        row["stats"] = context.stats()
        row["heads"] = context.core.layers[0].num_kv_heads
        assert row["difference"] <= 1e-5, row["difference"]
        assert not context.key_value_memory_dict
        assert_conserved(context, len(model.decoder.layers) * ids.numel())


def check_layout(report: Report, layout: str) -> None:
    """On four ranks only what needs them: with tensor parallelism over all of them, what peers share."""
    tp, ep, etp = map(int, layout.split(","))
    few, peers = dist.get_world_size() < 4, tp > 1 and etp == 1
    if tp < 4:
        check_heads(report, layout, sources=few)
    if few or peers:
        check_latent(report, layout, own_requests=few)
    if tp > 1 and (few or peers):
        check_shared_heads(report, layout)


def check_heads(report: Report, layout: str, sources: bool) -> None:
    model = tiny_model(tiny_config())
    dp_rank = parallel_state.get_data_parallel_rank()
    own, shared = tokens(ROWS, LENGTH, seed=5 + dp_rank), tokens(ROWS, 28, seed=4)
    own_pieces = [7 + dp_rank % 4, 5 - dp_rank % 4]  # ranks bring different numbers of columns
    static = StaticInferenceContext(ROWS, LENGTH)
    own_reference, shared_reference = decode(model, static, own, own_pieces), decode(model, static, shared, [7, 5])
    with report.check(f"{layout} static decoding equals the full forward"):
        difference = (own_reference[-1] - full_forward(model, own)[:, -1]).abs().max().item()
        assert difference < 1e-5, difference
    enable_pikv(model)
    check_decode(report, model, f"{layout} each rank its own requests", own, own_pieces, own_reference)
    # All ranks run the same rows; tensor-parallel peers always do.
    check_decode(report, model, f"{layout} the same requests on all ranks", shared, [7, 5], shared_reference)
    if sources:
        check_sources(report, model, layout, own, own_pieces, own_reference, shared, shared_reference)
        check_codec(report, model, layout, own, own_pieces, own_reference)
        check_linear(report, model, layout, own[:, :LONGEST_PROMPT], own_pieces, own_reference)


def check_latent(report: Report, layout: str, own_requests: bool) -> None:
    """Multi-latent attention: [c_kv | k_rot] is stored, Megatron's own static batching keeps expanded heads."""
    model, static = tiny_model(latent_config()), StaticInferenceContext(ROWS, LENGTH)
    seed = 5 + parallel_state.get_data_parallel_rank()
    own, shared = tokens(ROWS, LONGEST_PROMPT + 4, seed=seed), tokens(ROWS, LENGTH if own_requests else 24, seed=4)
    references = decode(model, static, own, [9]), decode(model, static, shared, [7, 5])
    enable_pikv(model)
    if own_requests:
        check_decode(report, model, f"{layout} MLA, each rank its own requests", own, [9], references[0])
        check_decode(report, model, f"{layout} MLA, ids true", own[:, :16], [9], references[0], expert_ids="true")
        check_latent_codec(report, model, layout, shared, references[1])
    check_decode(report, model, f"{layout} MLA, the same requests on all ranks", shared, [7, 5], references[1])


def check_latent_codec(report: Report, model, layout: str, shared, reference) -> None:
    """The latent coded, the rotary part of the key in fp16. A shard of two has too few entries to fill a group of int4."""
    with report.check(f"{layout} MLA, compressed pages") as row:
        grouped = {"int4": {"group": 32}} if dist.get_world_size() == 1 else {}
        for codec, options in ({"fp8_e4m3": {}} | grouped).items():
            context = PiKVInferenceContext(ROWS, LENGTH, model=model, config={"compression": {"method": codec, **options}})
            with dense_is_forbidden():
                logits = decode(model, context, shared, [7, 5])
            # The median: a token whose experts change by it is far off.
            row[codec] = ((logits - reference).norm(dim=-1) / reference.norm(dim=-1)).median().item()
            assert {fmt.label for fmt in CacheProbe(context.core).formats} == {f"{codec}+rope"}
            assert 1e-4 < row[codec] < (0.1 if codec == "fp8_e4m3" else 0.3), row
            assert_conserved(context, len(model.decoder.layers) * shared.numel())


def check_shared_heads(report: Report, layout: str) -> None:
    """Fewer KV heads than tensor-parallel ranks, so that peers hold the same ones."""
    shared = tokens(ROWS, 20, seed=4)
    model = tiny_model(tiny_config(num_query_groups=parallel_state.get_tensor_model_parallel_world_size() // 2))
    reference = decode(model, StaticInferenceContext(ROWS, LENGTH), shared, [7, 5])
    enable_pikv(model)
    for source in ("previous_layer", "true"):
        check_decode(report, model, f"{layout} KV heads that peers share, ids {source}", shared, [7, 5], reference, expert_ids=source)


def check_sources(report, model, layout, own, own_pieces, own_reference, shared, shared_reference) -> None:
    short = own[:, :LONGEST_PROMPT]
    check_decode(report, model, f"{layout} ids true", short, own_pieces, own_reference, expert_ids="true")
    check_decode(report, model, f"{layout} ids true, the same requests", shared[:, :16], [7, 5], shared_reference, expert_ids="true")
    check_decode(report, model, f"{layout} ids lookahead", short, own_pieces, own_reference, expert_ids="lookahead")
    name = f"{layout} ids lookahead, the same requests"
    check_decode(report, model, name, shared[:, :16], [7, 5], shared_reference, expert_ids="lookahead")
    check_decode(report, model, f"{layout} ids hash", short[:, :16], own_pieces, own_reference, expert_ids="hash")


def check_codec(report: Report, model, layout: str, own, own_pieces, own_reference) -> None:
    with report.check(f"{layout} int8 pages") as row:
        context = PiKVInferenceContext(ROWS, LENGTH, model=model, config={"compression": {"method": "int8"}})
        with dense_is_forbidden():
            logits = decode(model, context, own, own_pieces)
        # The median: a token whose experts change by it is far off.
        row["error"] = ((logits - own_reference).norm(dim=-1) / own_reference.norm(dim=-1)).median().item()
        row["stats"] = context.stats()
        assert row["stats"]["attention_impl"] == "pikv cpu int8" and 0 < row["error"] < 0.02, row
        assert_conserved(context, len(model.decoder.layers) * own.numel())


def check_linear(report: Report, model, layout: str, own, own_pieces, own_reference) -> None:
    """A linear codec of full rank, its maps cut by heads over tensor-parallel ranks, and a calibration that knows the model."""
    layers = find_layers(model)
    specs = [layer_spec_of(layer, i) for i, layer in enumerate(layers)]
    whole = [replace(spec, first_head=0, num_kv_heads=model.config.num_query_groups) for spec in specs]
    norms = []
    for spec, layer in zip(specs, layers, strict=True):
        known = torch.full((model.config.num_query_groups, spec.k_dim), -1.0, dtype=torch.float64)
        known[spec.first_head : spec.first_head + spec.num_kv_heads] = key_norms(layer.attention)
        dist.all_reduce(known, dist.ReduceOp.MAX)  # the heads of other ranks: all ranks read the same file
        norms.append(known)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/calibration.safetensors"
        random_calibration(whole, norms).save(path)
        compression = {"method": "lora_plus", "rank": 8, "calibration": path}
        with report.check(f"{layout} linear codec, full rank") as row:
            context = PiKVInferenceContext(ROWS, LENGTH, model=model, config={"page_size": 4, "compression": compression})
            borrowed = [*model.parameters(), *model.buffers(), *CacheProbe(context.core).weights]
            new = held_bytes(context, without=borrowed)
            with dense_is_forbidden():
                logits = decode(model, context, own, own_pieces)
            row["difference"] = (logits - own_reference[: len(logits)]).abs().max().item()
            row["first_head"] = specs[0].first_head
            assert row["difference"] <= 2e-5, row["difference"]
            context.free()
            assert held_bytes(context, without=borrowed) == new, "a tensor stays"
        with report.check(f"{layout} linear codec, other weights"):
            random_calibration(whole, [1.1 * x for x in norms]).save(path)
            with pytest.raises(ConfigError, match="made with other weights"):
                PiKVInferenceContext(ROWS, LENGTH, model=model, config={"compression": compression})
            random_calibration(whole, norms, [default_inv_freq(10_000.0, spec.k_dim) for spec in whole]).save(path)
            for window in ({}, {"raw_recent_tokens": 4}):  # un-rotated keys in the only pool, or in the far one
                pre = compression | {"rope": "pre"} | window
                with pytest.raises(ConfigError, match="under Megatron-Core this version does not undo rotations"):
                    PiKVInferenceContext(ROWS, LENGTH, model=model, config={"page_size": 4, "compression": pre})


if __name__ == "__main__":
    each_layout(check_layout)
