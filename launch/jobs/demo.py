"""One rank of `pikv demo`. Arguments: result file, prompt tokens, new tokens, and with --real the model folder. Rank 0 writes the rows."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from pikv_ds.launch.ranks import gather, own_stdout

EXPERT_PARALLEL = {"enabled": True}


class Generated(NamedTuple):
    tokens: list[int]
    logits: Any  # [new tokens, vocabulary] f32
    decode_s: float
    kv_bytes: int
    entries: int
    entries_per_expert: list[int]


class StepClock:
    """A streamer that only notes when each token came; the first call is the prompt, the second follows prefill."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def decode_s(self) -> float:
        return self.times[-1] - self.times[1]


class Prompt(NamedTuple):
    ids: list[int]
    answer: str
    question: str


def bundled_prompt(tokenizer: Any, length: int, new_tokens: int, seed: int) -> Prompt:
    from pikv_ds.bundled import passkey_prompt

    ids, key = passkey_prompt(tokenizer, length, seed=seed)
    return Prompt(ids, key, "What is" + tokenizer.decode(ids[-24:]).rpartition("What is")[2])


def real_prompt(tokenizer: Any, length: int, new_tokens: int, seed: int) -> Prompt:
    """As task passkey of `pikv eval` asks, in the model's chat template."""
    from pikv_ds.bundled import evaluation_text
    from pikv_ds.bundled.recall import Prose
    from pikv_ds.launch.evaluation.asked import Frame
    from pikv_ds.launch.evaluation.ruler import passkey_of_length

    prose = Prose(tokenizer, evaluation_text())
    made = passkey_of_length(Frame(prose, None), length, 0.5, seed)
    asked = tokenizer.decode(made.ids[-made.question_tokens :]).strip().partition("?")[0] + "?"
    return Prompt(made.ids, made.answers[0], asked)


def load(folder: str | None) -> tuple[Any, Any]:
    """The model in eval mode in float32, and its tokenizer; None: the bundled one."""
    from pikv_ds import bundled

    if folder is None:
        return bundled.load()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def build_engine(ranks: int, block: dict, folder: str | None) -> Any:
    import pikv_ds
    from pikv_ds.adapters.deepspeed.autoep_shim import registry_shim

    config = {"train_micro_batch_size_per_gpu": 1, "expert_parallel": {**EXPERT_PARALLEL, "autoep_size": ranks}, "pikv": block}
    # With PiKV off nothing is patched, and AutoEP alone does not load Qwen3-MoE on transformers 5.23.
    with registry_shim():
        engine = pikv_ds.initialize(model=load(folder)[0], config=config)[0]
    engine.eval()
    return engine


def generate(engine: Any, ids: list[int], new_tokens: int) -> Generated:
    import torch

    from pikv_ds.adapters.hf.argument_names import cache_of

    clock = StepClock()
    prompt = torch.tensor([ids], device=engine.device)
    # synced_gpus: every forward of an expert-parallel model is a collective, also for a rank that has finished.
    with torch.no_grad():
        output = engine.module.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
            synced_gpus=True,
        )
    cache = getattr(engine, "pikv", None)
    if cache is None:
        dense = cache_of(output)
        bytes_, entries, per_expert = dense_bytes(dense), dense_entries(dense), []
    else:
        stats = cache.stats()
        bytes_, entries, per_expert = stats["kv_bytes_allocated"], stats["entries_live"], stats["load_per_expert"]
    return Generated(
        output.sequences[0, len(ids) :].tolist(), torch.cat(output.logits).float().cpu(), clock.decode_s(), bytes_, entries, per_expert
    )


def dense_bytes(cache: Any) -> int:
    """Bytes of the storages behind the tensors of a DynamicCache."""
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))


def dense_entries(cache: Any) -> int:
    return sum(layer.keys.shape[0] * layer.keys.shape[2] for layer in cache.layers)


def summary(name: str, contexts: list[int], own: Generated, dense: Generated, tokenizer: Any) -> dict[str, Any]:
    """The row of one run, from all ranks."""
    fields = (
        own.kv_bytes,
        own.entries,
        own.entries_per_expert,
        own.tokens == dense.tokens,
        (own.logits - dense.logits).abs().max().item(),
        own.decode_s,
    )
    kv_bytes, entries, per_expert, equal, diff, decode_s = zip(*gather(fields), strict=True)
    return {
        "name": name,
        "ranks": len(kv_bytes),
        "context_tokens": contexts,
        "kv_bytes_per_rank": list(kv_bytes),
        "tokens_per_s": (len(own.tokens) - 1) / max(decode_s),
        "max_logit_diff": max(diff),
        "tokens_equal": all(equal),
        "answer": tokenizer.decode(own.tokens),
        "entries_per_rank": list(entries),
        "entries_per_expert": [counts for counts in per_expert if counts],
    }


def main() -> None:
    stdout = own_stdout()
    import deepspeed
    import torch.distributed as dist
    from transformers import AutoTokenizer

    from pikv_ds.bundled import model_path
    from pikv_ds.launch.commands.demo import SHORTEST_CONTEXT, SHORTEST_REAL

    result, context, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    folder = sys.argv[4] if len(sys.argv) > 4 else None
    deepspeed.init_distributed()
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def say(text: str) -> None:
        if rank == 0:
            print(text, file=stdout, flush=True)

    tokenizer = AutoTokenizer.from_pretrained(folder or model_path(), local_files_only=True)
    make = bundled_prompt if folder is None else real_prompt
    asked = make(tokenizer, context, new_tokens, 0)
    long_prompt = asked.ids
    short_prompt = make(tokenizer, max(SHORTEST_CONTEXT if folder is None else SHORTEST_REAL, context // 8), new_tokens, 1).ids
    say("building the model twice, with the dense cache and with PiKV")
    engines = {"dense": build_engine(ranks, {"enabled": False}, folder), "pikv": build_engine(ranks, {}, folder)}
    rows = []
    for suffix, ids in (("", long_prompt), ("-distinct", long_prompt if rank == 0 else short_prompt)):
        contexts = [len(long_prompt)] + [len(long_prompt) if not suffix else len(short_prompt)] * (ranks - 1)
        dense = None
        for cache_name, engine in engines.items():
            say(f"{cache_name + suffix}: prefill of {contexts} tokens, then {new_tokens} new ones")
            own = generate(engine, ids, new_tokens)
            dense = dense or own
            rows.append(summary(cache_name + suffix, contexts, own, dense, tokenizer))
            if hasattr(engine, "pikv"):
                engine.pikv.reset()
    if rank == 0:
        Path(result).write_text(json.dumps({"rows": rows, "pass_key": asked.answer, "question": asked.question}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
