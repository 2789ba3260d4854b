"""What an option's value names, when it is no plain value: tables and seeds stay JSON."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.candidate_generator import AssistantVocabTranslatorCache
from transformers.generation.streamers import BaseStreamer

from tests.tiny_models import tiny_model

from .letters import letters
from .loops import LOOPS, folder

if TYPE_CHECKING:
    from .calls import Call


class Heard(BaseStreamer):
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list = []

    def put(self, value) -> None:
        self.tokens.append(value.tolist())

    def end(self) -> None:
        self.tokens.append("end")


class Forwards(BaseStreamer):
    """A streamer that runs the model itself, without a cache of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.tokens = model, []

    def put(self, value) -> None:
        with torch.no_grad():
            self.tokens.append(self.model(value.reshape(1, -1)).logits[0, -1].argmax().item())

    def end(self) -> None:
        self.tokens.append("end")


class Shift(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + torch.linspace(-1, 1, scores.shape[-1])


class Asks(LogitsProcessor):
    """Looks one token ahead with the model itself, a forward without a cache inside a generate()."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids, scores):
        with torch.no_grad():
            ahead = self.model(scores.argmax(-1, keepdim=True)).logits[:, -1]
        return scores + 0.5 * ahead


class Every(StoppingCriteria):
    """Rows end at a token that the number divides."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % self.number == 0


class Thinks(StoppingCriteria):
    """Generates in a generate() before each decision."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids, scores, **kwargs):
        more = self.model.generate(input_ids[:, -4:], max_new_tokens=2, do_sample=False, pad_token_id=0)
        return more[:, -1] % 3 == 0


@cache
def draft(family: str, **changes) -> PreTrainedModel:
    """A small model of the same family with other weights."""
    return tiny_model(family, seed=5, num_hidden_layers=1 if family != "gpt_oss" else 2, **changes)


@cache
def _draft_with_other_tokens(samples: bool) -> PreTrainedModel:
    """generate() prunes its head for good when it samples, and draws numbers the first time: it is done here."""
    model = tiny_model("qwen3_moe", seed=5, num_hidden_layers=1, vocab_size=100)
    if samples:
        AssistantVocabTranslatorCache.get_translator(letters(), letters(100, first=6), 128, model, assistant_prune_lm_head=True)
    return model


def _assistant(call: Call, value: str) -> PreTrainedModel:
    if value == "itself":
        return call.model
    if value == "smaller vocabulary":
        return _draft_with_other_tokens(bool(call.options.get("do_sample")))
    return call.draft


def _ids(call: Call, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (call.rows, length), generator=torch.Generator().manual_seed(length))


MAKERS: dict[str, Callable[[Call, object], object]] = {
    "generation_config": lambda call, value: GenerationConfig(**value),
    "logits_processor": lambda call, value: LogitsProcessorList([Shift() if value == "shifts" else Asks(call.model)]),
    "stopping_criteria": lambda call, value: StoppingCriteriaList([Thinks(call.model) if value == "generates" else Every(value)]),
    "prefix_allowed_tokens_fn": lambda call, value: lambda row, ids: list(range(3 + int(ids[-1]) % 2, 128, value)),
    "assistant_model": _assistant,
    "streamer": lambda call, value: Heard() if value == "keeps" else Forwards(call.model),
    "negative_prompt_ids": lambda call, value: _ids(call, value),
    "negative_prompt_attention_mask": lambda call, value: torch.arange(value).expand(call.rows, -1).ge(2).long(),
    "custom_generate": lambda call, value: LOOPS.get(value) or (call.folder(folder) if value == "folder" else value),
    "tokenizer": lambda call, value: letters(),
    "assistant_tokenizer": lambda call, value: letters(100, first=6),
    "compile_config": lambda call, value: CompileConfig(**value),
    "continuous_batching_config": lambda call, value: ContinuousBatchingConfig(**value),
    "sequence_bias": lambda call, value: [[list(tokens), bias] for tokens, bias in value],
    "past_key_values": lambda call, value: (
        StaticCache(call.model.config, max_cache_len=64) if value == "static" else DynamicCache(config=call.model.config)
    ),
    "inputs": lambda call, value: letters()(letters().batch_decode(call.ids), return_tensors="pt", padding=True).input_ids,
    "watermarking_config": lambda call, value: SynthIDTextWatermarkingConfig(**value) if "keys" in value else WatermarkingConfig(**value),
    "inputs_embeds": lambda call, value: call.model.get_input_embeddings()(call.ids).detach(),
    "attention_mask": lambda call, value: (torch.arange(call.ids.shape[1]) < torch.full((call.rows, 1), value)).long(),
    "position_ids": lambda call, value: torch.arange(call.ids.shape[1]).expand(call.rows, -1) + value,
}


def remove(path: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
