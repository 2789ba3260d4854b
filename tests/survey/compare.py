"""One family: plain transformers beside the same model attached, by tokens and by logits of the prefill and of every step."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

import pikv_ds
from pikv_ds.errors import ConfigError, UnsupportedError
from tests.dist.jobs.exact import Run, generate
from tests.host_guard import host_is_forbidden

from .configs import VOCABULARY, tiny_config, tiny_model

PROMPT, PADDING, NEW_TOKENS = 24, 7, 12
TOLERANCE = 2e-5  # of logits, relative to the largest of them where that is above 1
SHARDS = (1, 2)


def survey(family: str) -> dict:
    """A row of the table: {"outcome": "served" | "refused" | "wrong" | "not in it", "why", ...}."""
    try:
        model = tiny_model(tiny_config(family))
        ids = torch.randint(4, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(ids)
        mask[1, :PADDING] = 0
        plain = ordinary(model, ids, mask)
    except Exception as error:  # noqa: BLE001  whatever a family needs that this rule does not give it
        return {"outcome": "not in it", "why": said(error)}
    row = {"class": type(model).__name__}
    for shards in SHARDS:
        try:
            with pikv_ds.attach(model, {"page_size": 4, "storage": {"num_shards": shards}}) as cache, host_is_forbidden(model):
                run = generate(model, ids, mask, new_tokens=NEW_TOKENS)
                run.stats = cache.stats()
        except (UnsupportedError, ConfigError) as error:
            return row | {"outcome": "refused", "why": said(error)}
        except Exception as error:  # noqa: BLE001  an error that is no refusal is a row too
            return row | {"outcome": "wrong", "why": f"{shards} shards: {said(error)}"}
        wrong = difference(run, plain)
        if wrong:
            return row | {"outcome": "wrong", "why": f"{shards} shards: {wrong}"}
    return row | {"outcome": "served", "why": "", "attention": run.stats["attention_impl"]}


def ordinary(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> Run:
    """Raises: what the model raises; ValueError when it generates without a DynamicCache or gives no numbers."""
    run = generate(model, ids, mask, new_tokens=NEW_TOKENS)
    with torch.no_grad():
        cache = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True).get("past_key_values")
    if type(cache) is not DynamicCache:
        raise ValueError(f"generates with {type(cache).__name__}, not with a DynamicCache")
    if not run.logits.isfinite().all():
        raise ValueError("gives logits that are not finite")
    return run


def difference(run: Run, plain: Run) -> str:
    """What is wrong, or nothing."""
    if not torch.equal(run.tokens, plain.tokens):
        return f"other tokens, logits differ by {run.difference(plain):.1e}"
    allowed = TOLERANCE * max(1.0, plain.logits.abs().max().item())
    return "" if run.difference(plain) <= allowed else f"logits differ by {run.difference(plain):.1e}"


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
