"""A transformers model with an attached cache: generate(), greedy."""

import functools

import torch
from transformers import PreTrainedModel

import pikv_ds
from pikv_ds import bundled
from tests.dist.jobs.exact import generate
from tests.host_guard import host_is_forbidden
from tests.recorded import probe
from tests.recorded.files import with_files
from tests.recorded.result import Result
from tests.tiny_models import prompt, tiny_model

DEFAULTS = {"family": "qwen3_moe", "length": 21, "batch": 2, "pads": (), "repeat": 1, "chunks": 0, "new_tokens": 12, "generations": 1}


def run(config: dict, feed: dict, group, folder) -> Result:
    """feed: family, of tests.tiny_models or "bundled"; length, batch, pads (masked columns of each row), repeat (the prompt n times in a
    row), chunks (the prompt is fed in so many), new_tokens, generations one after another; other keys go to generate(). With distinct
    requests every rank has prompts and lengths of its own."""
    family, length, batch, pads, repeat, chunks, new_tokens, generations = ({**DEFAULTS, **feed}[name] for name in DEFAULTS)
    options = {name: value for name, value in feed.items() if name not in DEFAULTS}
    rank = group.rank() if group is not None and config.get("storage", {}).get("requests") == "distinct" else 0
    model, outputs, tokens = model_of(family), [], []
    with pikv_ds.attach(model, with_files(config, folder, probe.layers_of(model), model), group) as cache, host_is_forbidden(model):
        for turn in range(generations):
            ids = prompt_of(family, length + 7 * rank - 4 * turn, 3 + 10 * rank + turn, batch).repeat(1, repeat)
            mask = torch.ones_like(ids)
            for row, pad in enumerate(pads):
                mask[row, :pad] = 0
            if chunks:
                options["prefill_chunk_size"] = -(-ids.shape[1] // chunks)
            made = generate(model, ids, mask, new_tokens=new_tokens, **options)
            outputs.append(made.logits)
            tokens += made.tokens[:, ids.shape[1] :].tolist()
        core = probe.core_of(cache)
        kept, numbers = probe.kept(core), probe.numbers(cache)
        return Result(outputs=outputs, tokens=tokens, kept=kept, numbers=numbers, bytes_after_reset=probe.bytes_after_reset(core))


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    return bundled.load()[0] if family == "bundled" else tiny_model(family)


def prompt_of(family: str, length: int, seed: int, batch: int) -> torch.Tensor:
    """Random tokens; of the bundled model prompts that hide a pass key."""
    if family != "bundled":
        return prompt(length, seed, batch)
    tokenizer = bundled.load()[1]
    return torch.tensor([bundled.passkey_prompt(tokenizer, length, seed=seed + row)[0] for row in range(batch)])
