"""The options of generate(), each with values to try. A test fails when the pinned transformers has one that is not here."""

from __future__ import annotations

import inspect

from transformers import GenerationConfig, GenerationMixin

SOON = list(range(3, 128, 4))
"""End tokens that a random model meets within some steps."""
SAMPLE = {"do_sample": True}
BEAMS = {"num_beams": 3}
HELP = {"assistant_model": "draft", "max_new_tokens": 9}
ENDS = {"eos_token_id": SOON, "max_new_tokens": 12}
WORDS = {"tokenizer": "letters"}
TRANSLATED = {**HELP, **WORDS, "assistant_model": "smaller vocabulary", "assistant_tokenizer": "letters"}
HUB = {"trust_remote_code": True}

TRIES: dict[str, list[dict]] = {
    # ---- how long
    "max_length": [{"max_length": 16, "max_new_tokens": None}],
    "max_new_tokens": [{"max_new_tokens": 1}, {"max_new_tokens": 12}],
    "min_length": [{**ENDS, "min_length": 17}],
    "min_new_tokens": [{**ENDS, "min_new_tokens": 7}, {**ENDS, **BEAMS, "min_new_tokens": 7}],
    "early_stopping": [{**ENDS, **BEAMS, "early_stopping": value} for value in (True, False, "never")],
    "max_time": [{"max_time": 0.0}, {"max_time": 900.0}],
    "stop_strings": [{**WORDS, "stop_strings": ["a", "b", "c", "d"], "max_new_tokens": 12}, {**WORDS, **BEAMS, "stop_strings": "ab"}],
    # ---- how a token is chosen
    "do_sample": [SAMPLE, {"do_sample": False}],
    "num_beams": [BEAMS, {**BEAMS, **SAMPLE}, {**BEAMS, **ENDS}],
    "num_return_sequences": [{**BEAMS, "num_return_sequences": 2}, {**SAMPLE, "num_return_sequences": 3}, {"num_return_sequences": 2}],
    "temperature": [{**SAMPLE, "temperature": 0.6}],
    "top_k": [{**SAMPLE, "top_k": 5}],
    "top_p": [{**SAMPLE, "top_p": 0.7}],
    "min_p": [{**SAMPLE, "min_p": 0.05}],
    "top_h": [{**SAMPLE, "top_h": 0.4}],
    "typical_p": [{**SAMPLE, "typical_p": 0.6}],
    "epsilon_cutoff": [{**SAMPLE, "epsilon_cutoff": 0.01}],
    "eta_cutoff": [{**SAMPLE, "eta_cutoff": 0.01}],
    "repetition_penalty": [{"repetition_penalty": 1.4}, {**BEAMS, "repetition_penalty": 1.4}],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.4}],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": 2}],
    "length_penalty": [{**BEAMS, **ENDS, "length_penalty": 2.5}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 2, "max_new_tokens": 12}],
    "bad_words_ids": [{"bad_words_ids": [[5], [7, 9], [21]]}],
    "renormalize_logits": [{**BEAMS, "repetition_penalty": 1.2, "renormalize_logits": True}],
    "forced_bos_token_id": [{"forced_bos_token_id": 9}],
    "forced_eos_token_id": [{"forced_eos_token_id": 2}],
    "remove_invalid_values": [{"remove_invalid_values": True}],
    "exponential_decay_length_penalty": [{**ENDS, "exponential_decay_length_penalty": [2, 1.5]}],
    "suppress_tokens": [{"suppress_tokens": list(range(40, 70))}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": list(range(3, 60))}],
    "sequence_bias": [{"sequence_bias": [[[9], 3.0], [[5, 11], 4.0]]}],
    "watermarking_config": [
        {"watermarking_config": {"greenlist_ratio": 0.4, "bias": 2.0}},
        {**SAMPLE, "watermarking_config": {"ngram_len": 3, "keys": [3, 7, 19], "context_history_size": 8, "sampling_table_size": 64}},
    ],
    "guidance_scale": [{"guidance_scale": 1.5}, {**SAMPLE, "guidance_scale": 1.5}],
    "token_healing": [{**WORDS, "token_healing": True, "inputs": "tokenized again"}],
    # ---- what is run beside it
    "is_assistant": [{"is_assistant": True}],
    "num_assistant_tokens": [{**HELP, "num_assistant_tokens": 2}],
    "num_assistant_tokens_schedule": [
        {**HELP, "num_assistant_tokens_schedule": value} for value in ("heuristic", "heuristic_transient", "constant")
    ],
    "assistant_confidence_threshold": [{**HELP, "assistant_confidence_threshold": 0.02}],
    "assistant_lookbehind": [
        {**HELP, **WORDS, "assistant_model": "smaller vocabulary", "assistant_tokenizer": "letters", "assistant_lookbehind": 4}
    ],
    "target_lookbehind": [
        {**HELP, **WORDS, "assistant_model": "smaller vocabulary", "assistant_tokenizer": "letters", "target_lookbehind": 4}
    ],
    "assistant_ensemble_weight": [{**HELP, **SAMPLE, "assistant_ensemble_weight": 0.4}],
    "assistant_early_exit": [{"assistant_early_exit": 1, "max_new_tokens": 9}],
    "prompt_lookup_num_tokens": [{"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}],
    "max_matching_ngram_size": [{"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "max_new_tokens": 12}],
    "use_mtp": [{"use_mtp": True}],
    "speculation_type": [{**HELP, "speculation_type": "dflash"}],
    # ---- the cache and the forward
    "use_cache": [{"use_cache": False}, {"use_cache": False, **BEAMS}, {"use_cache": True}],
    "cache_implementation": [
        {"cache_implementation": value} for value in ("dynamic", "static", "offloaded", "offloaded_static", "quantized", "paged")
    ],
    "cache_config": [{"cache_config": {"nbits": 4}}],
    "max_cache_len": [{"max_cache_len": 64}],
    "prefill_chunk_size": [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 4, **BEAMS}, {"prefill_chunk_size": 1}],
    "compile_config": [{"compile_config": {}}],
    "disable_compile": [{"disable_compile": True}],
    "continuous_batching_config": [{"continuous_batching_config": {}}],
    # ---- what comes back
    "output_attentions": [{"output_attentions": True}],
    "output_hidden_states": [{"output_hidden_states": True}, {"output_hidden_states": True, **BEAMS}],
    "output_scores": [{"output_scores": False}],
    "output_logits": [{"output_logits": False}],
    "return_dict_in_generate": [{"return_dict_in_generate": False}],
    # ---- tokens
    "pad_token_id": [{**ENDS, "pad_token_id": 1}],
    "bos_token_id": [{"bos_token_id": 5}],
    "eos_token_id": [ENDS, {"eos_token_id": 2}, {**ENDS, **SAMPLE}, {**ENDS, **HELP, "max_new_tokens": 12}],
    "decoder_start_token_id": [{"decoder_start_token_id": 5}],
    # ---- moved to the Hub
    "low_memory": [{"low_memory": True}],
    "penalty_alpha": [{"penalty_alpha": 0.6, "top_k": 4}, {"penalty_alpha": 0.6, "top_k": 4, **HUB}],
    "dola_layers": [{"dola_layers": "low"}, {"dola_layers": "low", **HUB}],
    "diversity_penalty": [{"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}],
    "num_beam_groups": [{"num_beams": 4, "num_beam_groups": 2}, {"num_beams": 4, "num_beam_groups": 2, **HUB}],
    "constraints": [{**BEAMS, "constraints": [9, 11]}],
    "force_words_ids": [{**BEAMS, "force_words_ids": [[9]]}],
    # ---- arguments of generate() itself, and what it hands on to the forward
    "inputs": [{}],
    "generation_config": [{"generation_config": {"num_beams": 2, "max_new_tokens": 4}}],
    "logits_processor": [{"logits_processor": "shifts"}, {"logits_processor": "asks the model"}],
    "stopping_criteria": [{"stopping_criteria": 3, "max_new_tokens": 9}, {"stopping_criteria": "generates"}],
    "prefix_allowed_tokens_fn": [{"prefix_allowed_tokens_fn": 2}, {**BEAMS, "prefix_allowed_tokens_fn": 2}],
    "synced_gpus": [{"synced_gpus": False}],
    "assistant_model": [HELP, {**HELP, **SAMPLE}, {**HELP, "assistant_model": "itself"}],
    "streamer": [{"streamer": "keeps"}, {"streamer": "runs the model"}, {"streamer": "keeps", **BEAMS}],
    "negative_prompt_ids": [{"guidance_scale": 1.5, "negative_prompt_ids": 6}],
    "negative_prompt_attention_mask": [{"guidance_scale": 1.5, "negative_prompt_ids": 6, "negative_prompt_attention_mask": 6}],
    "custom_generate": [
        *({"custom_generate": loop} for loop in ("greedy", "rewinding", "contrastive", "without_cache", "own_cache")),
        {"custom_generate": "folder", **HUB},
        {"custom_generate": "transformers-community/dola", **HUB},
    ],
    "trust_remote_code": [HUB],
    "tokenizer": [WORDS],
    "assistant_tokenizer": [TRANSLATED, {**TRANSLATED, **SAMPLE}],
    "inputs_embeds": [{"inputs_embeds": "prompt"}, {"inputs_embeds": "prompt", **BEAMS}],
    "attention_mask": [{"attention_mask": 99}, {"attention_mask": 6}, {"attention_mask": 7, "prefill_chunk_size": 2}],
    "position_ids": [{"position_ids": 0}, {"position_ids": 5}],
    "past_key_values": [{"past_key_values": "static"}, {"past_key_values": "dynamic"}],
    "logits_to_keep": [{"logits_to_keep": 2}],
    "output_router_logits": [{"output_router_logits": True}],
}

ONE_ROW = {"streamer", "token_healing", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"}
ONE_ROW |= {"output_router_logits"}
"""Plain generate() takes no batch with these."""
NO_OPTIONS = {"self", "kwargs", "_from_model_config", "transformers_version"}


def known() -> set[str]:
    """What the pinned transformers has."""
    return (set(GenerationConfig().to_dict()) | set(inspect.signature(GenerationMixin.generate).parameters)) - NO_OPTIONS


def case_of(options: dict, ranks: int, requests: str) -> dict:
    """Two rows padded on the left; distinct ranks have prompts of different lengths."""
    one_row = bool(ONE_ROW & set(options)) or options.get("custom_generate") in ("rewinding", "contrastive", "own_cache")
    programs = []
    for rank in range(ranks):
        mine = rank if requests == "distinct" else 0
        lengths = [9 + 3 * mine] if one_row else [9 + 3 * mine, 6]
        programs.append({"lengths": lengths, "seed": 3 + mine, "turns": [{"options": options}]})
    return {"family": "qwen3_moe", "requests": requests, "ranks": programs}


ONE_RANK_EACH = ("assistant_tokenizer/1",)
"""Tries that differ between two processes of plain transformers: the order of a set decides which tokens a translator has."""
SETTINGS = ((1, "distinct"), (2, "distinct"), (2, "replicated"))


def cases() -> dict[str, dict]:
    """By name: "option/number/ranks/requests"."""
    return {
        f"{option}/{number}/{ranks}/{requests}": case_of(options, ranks, requests)
        for option, tries in TRIES.items()
        for number, options in enumerate(tries)
        for ranks, requests in SETTINGS
        if requests == "distinct" or f"{option}/{number}" not in ONE_RANK_EACH
    }
