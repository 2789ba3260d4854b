"""A case: what each rank calls, in turns, on one attached model; its outcome beside plain transformers in the same process.

A case is plain JSON. {"family", "block", "requests", "ranks": one program per rank}; a program: {"lengths": of the prompt's rows,
"side": of the padding, "seed": of the tokens, "own_caches": passed by the user from the first turn on, "turns": [{"conversation",
"options", "more": tokens that a later turn adds to what the conversation has}]}. "exact": False where entries are lossy or dropped: then
only errors count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

import pikv_ds
from pikv_ds.errors import ConfigError, DivergedError, PeerError, UnsupportedError
from tests.tiny_models import tiny_model

from .calls import Call, difference
from .values import draft

TIMEOUT_S = 10.0


@cache
def model_of(family: str):
    return tiny_model(family)


@dataclass
class Talk:
    """One conversation: what it has so far, and its cache once there is one."""

    ids: Tensor
    mask: Tensor | None
    cache: object = None


def prompt_of(lengths: list[int], side: str, seed: int) -> tuple[Tensor, Tensor | None]:
    """Rows of these lengths, padded on a side: ids and mask, both [B, T]."""
    draw, width = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        real = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, real] = torch.randint(3, 128, (length,), generator=draw)
        mask[row, real] = 1
    return ids, mask if min(lengths) < width else None


def play(case: dict, program: dict, new_cache: Callable[[], object] | None) -> list[dict]:
    """The outcome of each turn, up to the first error. new_cache: of a conversation with several turns; None: plain transformers'."""
    model, assistant, talks, results = model_of(case["family"]), draft(case["family"]), {}, []
    turns = program["turns"]
    for number, turn in enumerate(turns):
        which = turn.get("conversation", 0)
        if which not in talks:
            talks[which] = Talk(*prompt_of(program["lengths"], program.get("side", "left"), program.get("seed", 0) + 31 * which))
            if program.get("own_caches"):
                talks[which].cache = new_cache()
        talk = talks[which]
        result = Call(model, assistant, talk.ids, talk.mask, turn["options"], 7 + number).run(talk.cache)
        results.append({**result, "given": talk.cache})
        if "error" in result:
            break
        if any(later.get("conversation", 0) == which for later in turns[number + 1 :]):
            if "inputs_embeds" in turn["options"]:  # what comes back then is the new tokens alone
                prompt = talk.ids.repeat_interleave(len(result["sequences"]) // len(talk.ids), 0)
                result["sequences"] = torch.cat([prompt, result["sequences"]], 1)
                results[-1]["sequences"] = result["sequences"]
            _go_on(talk, result, turn.get("more", 3), number)
    return results  # with the caches: a rank keeps each until none of them needs it


def _go_on(talk: Talk, result: dict, more: int, seed: int) -> None:
    """The answer and some new tokens are the next prompt; it goes on from the cache that came back."""
    answer = result["sequences"]
    new = torch.randint(3, 128, (len(answer), more), generator=torch.Generator().manual_seed(seed))
    grown = answer.shape[1] - talk.ids.shape[1] + more
    talk.ids = torch.cat([answer, new], 1)
    if talk.mask is not None and len(talk.mask) < len(answer):  # beams, or several samples of a row
        talk.mask = talk.mask.repeat_interleave(len(answer) // len(talk.mask), 0)
    talk.mask = None if talk.mask is None else torch.cat([talk.mask, talk.mask.new_ones(len(talk.mask), grown)], 1)
    talk.cache = result.get("cache", talk.cache)


@dataclass
class Outcome:
    """of one rank. status: served, tie, refused, same error, peer error or wrong; says: which error or what differs."""

    status: str
    says: str = ""
    turn: int = 0

    def row(self) -> dict:
        return {"status": self.status, "says": self.says, "turn": self.turn}


def run(case: dict, group: dist.ProcessGroup | None, rank: int) -> Outcome:
    """This rank's part, plain and then attached. All ranks of the group must call it with the same case."""
    from transformers import DynamicCache

    program, model = case["ranks"][rank], model_of(case["family"])
    paged = {"cache_implementation": "paged"} in [turn["options"] for turn in program["turns"]]  # starts threads, some of which stay
    expected = [{"error": "not run", "says": ""}] if paged else play(case, program, lambda: DynamicCache(config=model.config))
    block = {"page_size": 4, "timeout_s": TIMEOUT_S, **case.get("block", {})}
    block["storage"] = {**block.get("storage", {}), "requests": case.get("requests", "distinct")}
    try:
        with pikv_ds.attach(model, block, group) as attached:
            if case.get("draft_attached"):
                with pikv_ds.attach(draft(case["family"]), block, group):
                    got = _attached(case, program, attached, model)
            else:
                got = _attached(case, program, attached, model)
    except (ConfigError, UnsupportedError) as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    outcome = judge(expected, got, exact=case.get("exact", True))
    if outcome.status == "wrong" and not any("error" in turn for turn in (*expected, *got)):
        plain = (_noisy(case, program, seed) for seed in range(TIES))
        if any(judge(other, got, exact=True).status == "served" for other in plain):
            return Outcome("tie", outcome.says, outcome.turn)
    return outcome


TIES, NOISE = 16, 2e-6


def _noisy(case: dict, program: dict, seed: int) -> list[dict]:
    """Plain transformers' turns with noise in the last bits of what its attention and its head give.

    Where that changes what it says, two candidates, or two experts of a router, were alike.
    """
    from transformers import DynamicCache

    model, draw = model_of(case["family"]), torch.Generator().manual_seed(seed)
    last = [module for name, module in model.named_modules() if name.endswith(("o_proj", "lm_head"))]
    hooks = [one.register_forward_hook(lambda _, args, out: out * (1 + NOISE * torch.randn(out.shape, generator=draw))) for one in last]
    try:
        return play(case, program, lambda: DynamicCache(config=model.config))
    finally:
        for hook in hooks:
            hook.remove()


def _attached(case: dict, program: dict, attached, model) -> list[dict]:
    got = play(case, program, attached.new_cache)
    if len(case["ranks"]) == 1 or isinstance(got[-1].get("raised"), PeerError):
        return got
    try:
        with torch.no_grad():
            while attached.lockstep(False):  # other ranks may have more turns
                model(**attached.idle_inputs())
    except Exception as error:  # noqa: BLE001  it is an outcome as those of the turns are
        got.append({"error": type(error).__name__, "says": f"in lockstep behind them: {error}", "raised": error})
    return got


PLAIN_TOO = "plain raises too; "
NAMES = {"attention_mask", "position_ids", "past_key_values"}


def names_what_it_refuses(case: dict, says: str) -> bool:
    """Whether a refusal names an option of the case."""
    options = {name for program in case["ranks"] for turn in program["turns"] for name in turn["options"]}
    return says.startswith(PLAIN_TOO) or any(name in says for name in options | NAMES)


def judge(expected: list[dict], got: list[dict], *, exact: bool) -> Outcome:
    nothing = {"error": "nothing", "says": ""}
    for turn, (one, other) in enumerate(zip_longest(expected, got, fillvalue=nothing)):
        if "error" in other and isinstance(other["raised"], (ConfigError, UnsupportedError)):
            return Outcome("refused", f"{PLAIN_TOO if 'error' in one else ''}{other['error']}: {other['says']}", turn)
        if "error" in one or "error" in other:
            if one.get("error") == other.get("error") and not isinstance(other["raised"], (PeerError, DivergedError)):
                return Outcome("same error", f"{one['error']}: {one['says']}", turn)
            if isinstance(other.get("raised"), PeerError):
                return Outcome("peer error", f"{other['error']}: {other['says']}", turn)
            what = f"{other['error']}: {other['says']}" if "error" in other else "no error"
            plain = f" instead of {one['error']}: {one['says']}" if "error" in one else ""
            return Outcome("wrong", what + plain, turn)
        found = difference(one, other)
        if found is not None and exact:
            return Outcome("wrong", found, turn)
    return Outcome("served")
