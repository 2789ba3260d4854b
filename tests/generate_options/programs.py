"""Cases drawn at random: options composed, in one to three turns of one or two conversations, on ranks that do the same or each its own."""

from __future__ import annotations

import random

from .table import SOON

FAMILIES = {"qwen3_moe": 3, "mixtral": 2, "gpt_oss": 2, "deepseek_v3": 2, "qwen3_dense": 1}
MODES = {"greedy": 4, "sample": 3, "beams": 2, "beam sample": 1}
MODES |= {"draft": 2, "draft sample": 1, "itself": 0.5, "lookup": 1.5, "early exit": 1, "loop": 1}
ONE_ROW = {"draft", "draft sample", "itself", "lookup", "early exit"}
BLOCKS = {"plain": 7, "four shards": 2, "evicts": 0.5, "int8": 0.5}
SAYS = {
    "plain": {},
    "four shards": {"storage": {"num_shards": 4}},
    "evicts": {"scheduling": {"method": "streaming_llm", "budget_tokens": 24, "recent_tokens": 4, "sink_tokens": 2}},
    "int8": {"page_size": 64, "compression": {"method": "int8"}},
}
EXACT = ("plain", "four shards")
REFUSED = ({"output_attentions": True}, {"cache_implementation": "static"}, {"past_key_values": "dynamic"})

ALWAYS = {  # beside any mode; each with its probability
    "repetition_penalty": (0.12, [1.2, 1.5]),
    "no_repeat_ngram_size": (0.08, [2, 3]),
    "encoder_repetition_penalty": (0.04, [1.3]),
    "bad_words_ids": (0.06, [[[5], [7, 9]]]),
    "sequence_bias": (0.08, [[[[9], 3.0], [[5, 11], 4.0]]]),
    "suppress_tokens": (0.06, [list(range(40, 70))]),
    "begin_suppress_tokens": (0.05, [list(range(3, 60))]),
    "renormalize_logits": (0.05, [True]),
    "remove_invalid_values": (0.04, [True]),
    "forced_bos_token_id": (0.03, [9]),
    "forced_eos_token_id": (0.05, [2]),
    "watermarking_config": (0.05, [{"greenlist_ratio": 0.4, "bias": 2.0}]),
    "guidance_scale": (0.07, [1.5]),
    "logits_processor": (0.12, ["shifts", "asks the model"]),
    "stopping_criteria": (0.12, [5, 7, "generates"]),
    "prefix_allowed_tokens_fn": (0.05, [2, 3]),
    "prefill_chunk_size": (0.25, [1, 3, 4, 8]),
    "output_hidden_states": (0.06, [True]),
    "max_time": (0.04, [0.0, 900.0]),
    "min_new_tokens": (0.1, [3, 6]),
    "exponential_decay_length_penalty": (0.05, [[2, 1.5]]),
    "stop_strings": (0.1, [["a", "b", "c"], ["ab", "d"], "e"]),
    "logits_to_keep": (0.03, [2]),
    "return_dict_in_generate": (0.04, [False]),
}
SAMPLES = {
    "temperature": (0.4, [0.6, 1.3]),
    "top_k": (0.3, [5, 20]),
    "top_p": (0.3, [0.7, 0.95]),
    "min_p": (0.15, [0.05]),
    "typical_p": (0.15, [0.6]),
    "epsilon_cutoff": (0.1, [0.01]),
    "eta_cutoff": (0.1, [0.01]),
}
BEAMS = {"early_stopping": (0.4, [True, "never"]), "length_penalty": (0.3, [0.5, 2.0])}
HELPED = {
    "num_assistant_tokens": (0.6, [1, 3, 6]),
    "num_assistant_tokens_schedule": (0.5, ["heuristic", "heuristic_transient", "constant"]),
    "assistant_confidence_threshold": (0.3, [0.0, 0.02]),
}


def case_of(seed: int, ranks: int) -> dict:
    """The same on every rank that asks."""
    draw = random.Random(f"{seed} on {ranks}")
    block, family = _one_of(draw, BLOCKS), _one_of(draw, FAMILIES)
    if family == "mixtral" and block == "evicts":  # refused, as windows bound all of its layers
        block = "plain"
    case = {"family": family, "requests": "distinct", "block": SAYS[block], "exact": block in EXACT}
    first = _program(draw)
    programs = [first]
    if ranks > 1:
        case["requests"] = draw.choice(("distinct", "distinct", "replicated"))
        for rank in range(1, ranks):
            other = _program(draw) if draw.random() < 0.6 else {**first, "lengths": _lengths(draw, len(first["lengths"]))}
            programs.append(first if case["requests"] == "replicated" else {**other, "seed": first["seed"] + rank})
    if draw.random() < 0.06:
        refused = draw.choice(REFUSED)
        for program in programs:
            program["turns"] = [{**turn, "options": {**turn["options"], **refused}} for turn in program["turns"][:1]]
    case["draft_attached"] = draw.random() < 0.25
    return {**case, "ranks": programs}


def _program(draw: random.Random) -> dict:
    modes = [_one_of(draw, MODES) for _ in range(draw.choice((1, 1, 2, 3)))]
    rows = 1 if ONE_ROW & set(modes) else draw.choice((1, 2, 3))
    turns, talked = [], set()
    for mode in modes:
        which = draw.choice((0, 0, 1))
        turns.append({"conversation": which, "options": _options(draw, mode, rows, which not in talked), "more": draw.randint(1, 6)})
        talked.add(which)
    return {
        "lengths": _lengths(draw, rows),
        "side": draw.choice(("left",) * 9 + ("right",)),
        "seed": draw.randrange(1000),
        "own_caches": draw.random() < 0.3,
        "turns": turns,
    }


def _lengths(draw: random.Random, rows: int) -> list[int]:
    return [draw.randint(1, 22)] * rows if draw.random() < 0.3 else [draw.randint(1, 22) for _ in range(rows)]


def _options(draw: random.Random, mode: str, rows: int, first: bool) -> dict:
    options: dict = {"max_new_tokens": draw.choice((1, 3, 5, 8, 12))}
    if draw.random() < 0.4:
        options["eos_token_id"] = SOON
    if mode == "loop":
        loops = ("greedy", "without_cache") if rows > 1 else ("greedy", "without_cache", "contrastive", "rewinding", "own_cache")
        return options | {"custom_generate": draw.choice(loops if first else ("without_cache",))}
    _add(draw, options, ALWAYS)
    if "stop_strings" in options:
        options["tokenizer"] = "letters"
    if "sample" in mode:
        options["do_sample"] = True
        _add(draw, options, SAMPLES)
    if "beam" in mode:
        options["num_beams"] = draw.choice((2, 3, 4))
        _add(draw, options, BEAMS)
        if draw.random() < 0.3:
            options["num_return_sequences"] = options["num_beams"]
    elif mode == "sample" and draw.random() < 0.15:
        options["num_return_sequences"] = 2
    if mode in ("draft", "draft sample", "itself"):
        options["assistant_model"] = "itself" if mode == "itself" else "draft"
        _add(draw, options, HELPED)
    if mode == "lookup":
        options |= {"prompt_lookup_num_tokens": draw.choice((1, 3, 6)), "max_matching_ngram_size": draw.choice((1, 2, 3))}
    if mode == "early exit":
        options["assistant_early_exit"] = 1
    if mode == "greedy" and draw.random() < 0.1:
        options["use_cache"] = False
    if mode in ("greedy", "sample") and rows == 1 and draw.random() < 0.15:
        options["streamer"] = draw.choice(("keeps", "runs the model"))
    if first and draw.random() < 0.06:
        options["inputs_embeds"] = "prompt"
    return options


def _add(draw: random.Random, options: dict, table: dict) -> None:
    for name, (probability, values) in table.items():
        if draw.random() < probability:
            options[name] = draw.choice(values)


def _one_of(draw: random.Random, weights: dict) -> str:
    return draw.choices(list(weights), list(weights.values()))[0]
