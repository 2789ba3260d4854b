"""Loops of the kind that users pass as custom_generate. Each runs the model in a way of its own."""

import tempfile
from pathlib import Path

import torch

from pikv_ds.adapters.hf.argument_names import IN_GENERATE


def _finish(model, input_ids, scores, cache):
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=tuple(scores), past_key_values=cache)


def greedy(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """One token a step."""
    cache, mask, scores = model_kwargs.get(IN_GENERATE), model_kwargs.get("attention_mask"), []
    fed = 0
    while True:
        out = model(input_ids[:, fed:], attention_mask=mask, past_key_values=cache)
        fed, cache = input_ids.shape[1], out.past_key_values
        scores.append(logits_processor(input_ids, out.logits[:, -1].float()))
        input_ids = torch.cat([input_ids, scores[-1].argmax(-1, keepdim=True)], 1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if bool(stopping_criteria(input_ids, scores[-1]).all()):
            return _finish(model, input_ids, scores, cache)


def rewinding(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Every token is fed twice, with another one behind it the first time, and taken back."""
    cache, scores, fed = model_kwargs[IN_GENERATE], [], 0
    cache.activate_past_recording()
    while True:
        new = input_ids[:, fed:]
        model(torch.cat([new, torch.full_like(new[:, :1], 7)], 1), past_key_values=cache)
        cache.crop(-new.shape[1] - 1)
        out = model(new, past_key_values=cache)
        fed = input_ids.shape[1]
        scores.append(out.logits[:, -1].float())
        input_ids = torch.cat([input_ids, scores[-1].argmax(-1, keepdim=True)], 1)
        if bool(stopping_criteria(input_ids, scores[-1]).all()):
            return _finish(model, input_ids, scores, cache)


def contrastive(model, input_ids, logits_processor, stopping_criteria, generation_config, top=3, alpha=0.6, **model_kwargs):
    """Of the likeliest tokens, the one whose hidden state is least like those before: rows are repeated, run, and one of each kept."""
    cache, rows, scores = model_kwargs[IN_GENERATE], len(input_ids), []
    out = model(input_ids, past_key_values=cache, output_hidden_states=True)
    hidden, logits = out.hidden_states[-1], out.logits[:, -1].float()
    while True:
        probabilities, tokens = logits.softmax(-1).topk(top)
        scores.append(logits)
        cache.batch_repeat_interleave(top)
        out = model(tokens.reshape(-1, 1), past_key_values=cache, output_hidden_states=True)
        now = torch.nn.functional.normalize(out.hidden_states[-1].view(rows, top, -1), dim=-1)
        alike = torch.einsum("btd,bkd->bkt", torch.nn.functional.normalize(hidden, dim=-1), now).amax(-1)
        best = ((1 - alpha) * probabilities - alpha * alike).argmax(-1)
        keep = torch.arange(rows) * top + best
        cache.batch_select_indices(keep)
        logits = out.logits[keep, -1].float()
        hidden = torch.cat([hidden, out.hidden_states[-1][keep]], 1)
        input_ids = torch.cat([input_ids, tokens.gather(1, best.unsqueeze(1))], 1)
        if bool(stopping_criteria(input_ids, logits).all()):
            return _finish(model, input_ids, scores, cache)


def without_cache(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """The whole sequence in every step."""
    scores = []
    while True:
        scores.append(model(input_ids, attention_mask=model_kwargs.get("attention_mask"), use_cache=False).logits[:, -1].float())
        input_ids = torch.cat([input_ids, scores[-1].argmax(-1, keepdim=True)], 1)
        if model_kwargs.get("attention_mask") is not None:
            mask = model_kwargs["attention_mask"]
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if bool(stopping_criteria(input_ids, scores[-1]).all()):
            return _finish(model, input_ids, scores, None)


def own_cache(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """A forward without a cache makes its own, and goes on with it; then generate() in a generate()."""
    out = model(input_ids)
    nxt = out.logits[:, -1].argmax(-1, keepdim=True)
    second = model(nxt, past_key_values=out.past_key_values).logits[:, -1].argmax(-1, keepdim=True)
    input_ids = torch.cat([input_ids, nxt, second], 1)
    input_ids = model.generate(input_ids, max_new_tokens=3, do_sample=False)
    return _finish(model, input_ids, [out.logits[:, -1].float()], None)


LOOPS = {one.__name__: one for one in (greedy, rewinding, contrastive, without_cache, own_cache)}

_FOLDER = '''"""A loop in a folder, as those of the Hub: generate() hands on all of its arguments."""


def generate(model, inputs=None, **kwargs):
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return model.generate(inputs, **{**kwargs, "num_beams": 2})
'''


def folder() -> str:
    """A folder with custom_generate/generate.py."""
    path = Path(tempfile.mkdtemp(prefix="pikv_loop_"))
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text(_FOLDER)
    (path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return str(path)
