"""Folders of the bundled model as lm-eval meets models: with several end tokens, BOS, chat templates, special tokens that it says."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers.processors import Sequence, TemplateProcessing

from pikv_ds import bundled

TEXT = bundled.evaluation_text()
CHAT = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
REFUSED = "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
NO_SYSTEM = CHAT.replace("{% for m in messages %}", "{% for m in messages %}" + REFUSED)


def two_ends(model, tokenizer) -> None:
    ids = tokenizer(TEXT[:300], return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=9, do_sample=False)[0, -9:].tolist()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, said[-1], said[4]]


def says_special(model, tokenizer) -> None:
    """The ninth token that it says after the beginning of the text is <|pad|>."""
    ids = tokenizer(TEXT[:300], return_tensors="pt").input_ids
    ninth = int(model.generate(ids, max_new_tokens=9, do_sample=False)[0, -1])
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[[1, ninth]] = model.lm_head.weight[[ninth, 1]]


def puts_bos(model, tokenizer) -> None:
    tokenizer.bos_token = "<|pad|>"
    backend = tokenizer.backend_tokenizer
    adds = TemplateProcessing(single="<|pad|> $A", pair="<|pad|> $A $B", special_tokens=[("<|pad|>", 1)])
    backend.post_processor = adds if backend.post_processor is None else Sequence([backend.post_processor, adds])
    tokenizer.chat_template = CHAT


def chats(model, tokenizer) -> None:
    tokenizer.chat_template = CHAT


def chats_without_system(model, tokenizer) -> None:
    tokenizer.chat_template = NO_SYSTEM


def no_pad(model, tokenizer) -> None:
    """lm-eval takes another token for padding; a short limit, and cuts on the left when asked to."""
    tokenizer.pad_token, tokenizer.model_max_length, tokenizer.truncation_side = None, 40, "left"
    model.generation_config.pad_token_id = None


def samples_by_default(model, tokenizer) -> None:
    config = model.generation_config
    config.do_sample, config.top_k, config.repetition_penalty = True, 5, 1.3


def plain(model, tokenizer) -> None:
    """As it comes, in bfloat16."""


CHANGES: dict[str, Callable] = {
    change.__name__: change for change in (plain, two_ends, says_special, puts_bos, chats, chats_without_system, no_pad, samples_by_default)
}


def save(name: str, folder: Path) -> str:
    """A folder of the model with one of CHANGES; its weights are those of fp32, but for `plain`."""
    if name == "plain":
        return str(bundled.model_path())
    model, tokenizer = bundled.load(torch.float32)
    tokenizer = copy.deepcopy(tokenizer)
    CHANGES[name](model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
