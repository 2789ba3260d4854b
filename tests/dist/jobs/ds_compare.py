"""Shared by the DeepSpeed jobs: generate with an engine and with plain Hugging Face eager attention, and compare."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from tests.tiny_models import prompt, tiny_model

NEW_TOKENS = 12
MICRO = {"train_micro_batch_size_per_gpu": 1}


def ready(start: Callable, **arguments):
    """The engine of deepspeed.initialize or pikv_ds.initialize, in eval mode (its eval() returns nothing)."""
    engine = start(**arguments)[0]
    engine.eval()
    return engine


def rank_prompt(requests: str) -> torch.Tensor:
    """The same prompt on all ranks, or one of its own length and content on each."""
    own = dist.get_rank() if requests == "distinct" else 0
    return prompt(13 + 6 * own, seed=3 + own)


def generate(model, ids: torch.Tensor, **options):
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )


def assert_same_text(row: dict, out, family: str, ids: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Tokens identical to Hugging Face eager attention in this process, logits within the tolerance."""
    expected = generate(tiny_model(family), ids)
    row["tokens"] = out.sequences[0, ids.shape[1] :].tolist()
    assert torch.equal(out.sequences, expected.sequences), (row["tokens"], expected.sequences.tolist())
    row["max_logit_diff"] = max((a - b).abs().max().item() for a, b in zip(out.logits, expected.logits, strict=True))
    assert row["max_logit_diff"] <= tolerance, row["max_logit_diff"]


def record_stats(row: dict, cache) -> None:
    """Numbers the test sums over ranks."""
    names = (
        "kv_bytes_allocated",
        "kv_bytes_dense",
        "entries_appended",
        "entries_live",
        "entries_expired",
        "entries_evicted",
        "entries_cropped",
        "exchange_collectives",
    )
    stats = cache.stats()
    row["stats"] = {name: stats[name] for name in names}
