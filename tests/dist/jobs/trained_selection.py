"""Which pages a trained gate chooses, on these ranks under a host. Arguments: deepspeed | megatron, the file of the gate.

The bundled model reads the same tokens everywhere; entries lie by position, in as many shards everywhere.
"""

import hashlib
import sys

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds import bundled
from pikv_ds.cache.inspect import CacheProbe
from tests.dist.jobs.report import Report

PROMPT, CHUNKS = 256, (16, 1, 1, 1, 1, 1, 1)
Chosen = dict[tuple[int, ...], set[tuple[int, int]]]


def block(file: str) -> dict:
    return {
        "page_size": 16,
        "storage": {"num_shards": 4, "placement": "position", "requests": "replicated"},
        "routing": {"method": "learned", "path": file, "budget_ratio": 0.25},
    }


def watch(core) -> Chosen:
    """(layer, position, kv head) -> (shard, first position) of the pages that are read, of this rank's shards."""
    chosen: Chosen = {}

    def look(asked, page_list) -> None:
        listed = page_list.view(*asked.visible.shape[:2], *page_list.shape[1:])  # [Q, S, H, K]
        for query, shard, head, k in (listed >= 0).nonzero().tolist():
            place = (int(asked.map.local[shard]), int(asked.first[query, shard, listed[query, shard, head, k]]))
            chosen.setdefault((asked.layer, int(asked.positions[query]), head), set()).add(place)

    CacheProbe(core).on_choice(look)
    return chosen


def under_deepspeed(file: str, ids: torch.Tensor) -> Chosen:
    model, _ = bundled.load(torch.float32)
    engine = pikv_ds.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1, "pikv": block(file)})[0]
    engine.eval()
    cache = engine.pikv
    chosen = watch(cache.core)
    cache.begin_generation()
    for part in ids.split([PROMPT, *CHUNKS]):
        engine.module(part[None], past_key_values=cache)
    return chosen


def under_megatron(file: str, ids: torch.Tensor) -> Chosen:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, enable_pikv
    from pikv_ds.megatron_patch.hf_config import build_gpt
    from pikv_ds.megatron_patch.hf_weights import load_hf_weights

    dist.init_process_group("gloo")
    cpu_compat.install()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(0)
    hf, _ = bundled.load(torch.float32)
    model = build_gpt(hf.config, max_sequence_length=len(ids), **cpu_compat.cpu_config_options()).eval()
    load_hf_weights(model, hf.config, hf.state_dict())
    enable_pikv(model, block(file))
    context = PiKVInferenceContext(1, len(ids), model=model)
    chosen, start = watch(context.core), 0
    for part in ids.split([PROMPT, *CHUNKS]):
        end = start + len(part)
        mask = torch.ones(len(part), end, dtype=torch.bool).triu(1 + start)[None, None]
        model(part[None], torch.arange(start, end)[None], mask, inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(len(part))
        start = end
    return chosen


if __name__ == "__main__":
    report = Report()
    with report.check("selection") as row, torch.no_grad():
        _, tokenizer = bundled.load(torch.float32)
        ids = torch.tensor(tokenizer(bundled.haystack(), verbose=False)["input_ids"][: PROMPT + sum(CHUNKS)])
        own = {"deepspeed": under_deepspeed, "megatron": under_megatron}[sys.argv[1]](sys.argv[2], ids)
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        whole: Chosen = {}
        for part in parts:
            for key, places in part.items():
                whole.setdefault(key, set()).update(places)
        said = "\n".join(f"{key} {sorted(whole[key])}" for key in sorted(whole))
        row |= {"keys": len(whole), "pages": sum(map(len, whole.values())), "digest": hashlib.sha256(said.encode()).hexdigest()}
    dist.destroy_process_group()
