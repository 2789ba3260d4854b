"""What tasks ask of lm-eval's models, one style at a time: a model, its arguments, requests. No lm-eval is needed to import this."""

import json
from dataclasses import dataclass, field
from typing import Any

from pikv_ds import bundled

TEXT = bundled.evaluation_text()
LONG_PROMPT, PROMPT, SHORT, OTHER = TEXT[:900], TEXT[:300], TEXT[:90], TEXT[2000:2170]
SPLIT = (SHORT, " of the battle of", " the")  # one text, split at several places
LIMITS = {"max_length": 96}
USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))
QUESTION = [USER | {"content": SHORT}]
SHOTS = [SYSTEM | {"content": "Answer."}, USER | {"content": OTHER}, ASSISTANT | {"content": " the film ."}, *QUESTION]


@dataclass(frozen=True, kw_only=True)
class Style:
    """asked: (method of the model, its requests' arguments) in turn; a list of messages in place of a text is put through the template.

    seed: of torch before each of them. moves_rows: refused under Megatron.
    """

    asked: list[tuple[str, list[tuple]]]
    model: str = "plain"
    args: dict[str, Any] = field(default_factory=dict)
    batch: int | str = 3
    seed: int | None = None
    moves_rows: bool = False


def until(*stops: str, tokens: int = 10, **options: Any) -> dict[str, Any]:
    return {"until": list(stops), "max_gen_toks": tokens, **options}


def texts(*prompts: Any, **options: Any) -> tuple[str, list[tuple]]:
    """generate_until of each prompt, all with the same options."""
    return "generate_until", [(prompt, options or until("\n\n")) for prompt in prompts]


def likely(*pairs: tuple[Any, str]) -> tuple[str, list[tuple]]:
    return "loglikelihood", list(pairs)


def rolling(*strings: str) -> tuple[str, list[tuple]]:
    return "loglikelihood_rolling", [(string,) for string in strings]


RAGGED = (PROMPT, SHORT, OTHER, TEXT[40:60])
SAMPLED = {"do_sample": True, "temperature": 0.8}

STYLES = {
    "end tokens": Style(model="two_ends", asked=[texts(*RAGGED, **until("\n\n", tokens=14)), likely((PROMPT, " the battle of"))]),
    "special tokens": Style(model="says_special", asked=[texts(*RAGGED, **until("\n\n", tokens=14))]),
    "empty stop string": Style(asked=[texts(*RAGGED, **until("")), texts(*RAGGED, **until("", " the"))]),
    "several stop strings": Style(asked=[texts(*RAGGED, **until("\n", " .", " in the", "the f", "<|endoftext|>", tokens=14))]),
    "stop as a string, or none": Style(asked=[texts(*RAGGED, until=" of", max_gen_toks=8), texts(SHORT, max_gen_toks=6)]),
    "names of the limit": Style(
        asked=[texts(SHORT, until=["\n"], **{name: 5}) for name in ("max_new_tokens", "max_tokens", "max_completion_tokens")]
        + [texts(SHORT, until=["\n"], max_gen_toks=4, max_tokens=7), texts(SHORT, until=["\n"], max_gen_toks=30, max_length=40)]
    ),
    "default limit": Style(args={"max_length": 300}, asked=[texts(SHORT, until=["no such text"])]),
    "bos": Style(
        model="puts_bos",
        asked=[
            texts(QUESTION, SHOTS, SHORT),
            likely((QUESTION, " the"), (SHORT, " the battle"), ("", " the battle")),
            rolling(SHORT, "<|pad|>" + SHORT),
        ],
    ),
    "bos left out": Style(model="puts_bos", args={"add_bos_token": False}, asked=[texts(*RAGGED), likely((SHORT, " the")), rolling(SHORT)]),
    "bos by a template alone": Style(model="puts_bos", args={"add_bos_token": True}, asked=[texts(QUESTION), likely((SHORT, " the"))]),
    "chat": Style(model="chats", asked=[texts(QUESTION, SHOTS), likely((SHOTS, " the film"), (SHOTS[:3], " in"))]),
    "chat without a system role": Style(model="chats_without_system", asked=[texts(QUESTION, SHOTS), likely((SHOTS, " the film"))]),
    "long prompts": Style(
        args=LIMITS, asked=[texts(LONG_PROMPT, SHORT), likely((LONG_PROMPT, " the battle of"), (SHORT, " the"), (SHORT, PROMPT[:200]))]
    ),
    "truncation by the tokenizer": Style(model="no_pad", args={"truncation": True}, asked=[texts(LONG_PROMPT, OTHER), texts(*RAGGED)]),
    "no pad token": Style(model="no_pad", asked=[texts(*RAGGED, **until(" .")), likely((SHORT, " the"))]),
    "choices": Style(
        asked=[
            likely(*((SHORT, choice) for choice in (" the", " of", " the battle of Hastings", " was"))),
            likely((SHORT, " the"), (OTHER, " the"), (OTHER, " a film"), (SHORT, " of the")),
            likely((SPLIT[0], SPLIT[1] + SPLIT[2]), (SPLIT[0] + SPLIT[1], SPLIT[2]), (SPLIT[0] + SPLIT[1], " a"), (SHORT + " ", " the")),
        ]
    ),
    "choices one by one": Style(
        args={"logits_cache": False}, batch=1, asked=[likely(*((SHORT, choice) for choice in (" the", " of", " the battle of", " was")))]
    ),
    "rolling": Style(args={"max_length": 32}, asked=[rolling(TEXT[:700], SHORT, TEXT[700:1000], " x")]),
    "rolling in whole windows": Style(args={"max_length": 8}, batch=2, asked=[rolling(" the" * 16, " the" * 17, " the" * 8, " the" * 7)]),
    "rolling with another prefix": Style(
        args={"prefix_token_id": 5, "max_length": 32}, asked=[rolling(TEXT[:300]), likely(("", " the film"))]
    ),
    "sampling": Style(seed=7, asked=[texts(*RAGGED, **until("\n", **SAMPLED)), texts(SHORT, **until(" .", **SAMPLED, top_p=0.9))]),
    "sampling by temperature alone": Style(seed=8, asked=[texts(*RAGGED, until=["\n"], max_gen_toks=8, temperature=1.3, top_k=20)]),
    "temperature without sampling": Style(
        asked=[texts(SHORT, **until("\n", temperature=0.0)), texts(SHORT, **until(do_sample=False, temperature=0.6))]
    ),
    "a model that samples": Style(model="samples_by_default", seed=9, asked=[texts(*RAGGED), texts(SHORT, **until(**SAMPLED))]),
    "logits processors": Style(asked=[texts(*RAGGED, **until("\n", repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=4))]),
    "beams": Style(moves_rows=True, asked=[texts(*RAGGED, **until("\n", tokens=6, num_beams=3))]),
    "empty contexts": Style(asked=[likely(("", " the battle"), ("", "<|endoftext|> the film"), ("", "x"), (SHORT, " the"))]),
    "unicode": Style(
        asked=[
            texts("naïve café — 東京 🙂", "e\u0301 и ё \u200bש", **until("\n", "é")),
            likely(("東京", " は 🙂"), ("caf", "é — naïve"), ("a  ", " b")),
            rolling("🙂🙂 Ελλάδα", "\u00a0\t\r\n x"),
        ]
    ),
    "automatic batches": Style(
        args={"max_batch_size": 2, "max_length": 48},
        batch="auto",
        asked=[texts(*RAGGED), likely((SHORT, " the"), (OTHER, " a film")), rolling(OTHER)],
    ),
    "batches by length": Style(
        args={"max_batch_size": 2, "max_length": 48}, batch="auto:2", asked=[likely((SHORT, " the"), (OTHER, " a film"))]
    ),
    "thoughts": Style(args={"think_end_token": " the"}, asked=[texts(*RAGGED, **until(" .", tokens=14))]),
    "thoughts by a token": Style(args={"think_end_token": "387"}, asked=[texts(*RAGGED, **until(" .", tokens=14))]),
    "softmax in float64": Style(args={"softmax_dtype": "float64"}, asked=[likely((SHORT, " the battle of"), (OTHER, " a"))]),
}  # fmt: skip


SHORT_FORM = ["special tokens", "bos", "choices", "rolling in whole windows", "sampling", "unicode"]


def answers(lm: Any, style: Style) -> list:
    """What the model gives, in plain data; texts and scores as they come."""
    import torch
    from lm_eval.api.instance import Instance

    given = []
    for kind, asked in style.asked:
        if style.seed is not None:
            torch.manual_seed(style.seed)
        filled = [tuple(_text(lm, argument) for argument in arguments) for arguments in asked]
        requests = [Instance(kind, {}, arguments, idx) for idx, arguments in enumerate(filled)]
        given.append(getattr(lm, kind)(requests, disable_tqdm=True))
    return json.loads(json.dumps(given))


def assert_equal(ours: list, theirs: list, tolerance: float) -> None:
    """Texts and booleans are the same, scores within `tolerance`."""
    assert len(ours) == len(theirs), (ours, theirs)
    for own, other in zip(ours, theirs, strict=True):
        if isinstance(other, list):
            assert_equal(own, other, tolerance)
        elif isinstance(other, float):
            assert abs(own - other) <= tolerance, (own, other)
        else:
            assert own == other, (own, other)


def _text(lm: Any, argument: Any) -> Any:
    """Messages that end with the assistant's are to be continued."""
    if not isinstance(argument, list):
        return argument
    return lm.apply_chat_template(argument, add_generation_prompt=argument[-1]["role"] != "assistant")
