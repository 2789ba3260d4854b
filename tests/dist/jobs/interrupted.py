"""Generates that one of two ranks breaks off and begins again at once, while the other goes on. args: seed, count.

All ranks end with the tokens of an ordinary cache: on the same group, or, where a rank was told that another left it, on a new one.
"""

import random
import sys

import torch
import torch.distributed as dist
from transformers import StoppingCriteria

import pikv_ds
from pikv_ds.errors import DivergedError, PeerError
from tests.dist.jobs.exact import generate
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model

KINDS = ("Ctrl-C in a streamer", "an exception in a streamer", "an exception in a stopping criterion", "Ctrl-C in a layer")
NEW_TOKENS = 10


class Broken(Exception):
    """What breaks a generate off."""


class At:
    """Raises at its n-th call."""

    def __init__(self, calls: int, error: type[BaseException]) -> None:
        self.left, self.error = calls, error

    def count(self, *_) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error

    def put(self, _) -> None:
        self.count()

    def end(self) -> None: ...


class Stops(StoppingCriteria):
    def __init__(self, at: At) -> None:
        self.at = at

    def __call__(self, ids, scores, **_):
        self.at.count()
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def broken_off(model, ids, kind: str, calls: int) -> str:
    """What this rank's generate ended with."""
    at = At(calls, KeyboardInterrupt if kind.startswith("Ctrl-C") else Broken)
    how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    hook = None
    if "streamer" in kind:
        how["streamer"] = at
    elif "criterion" in kind:
        how["stopping_criteria"] = [Stops(at)]
    else:
        hook = model.model.layers[-1].register_forward_hook(at.count)
    try:
        model.generate(ids, **how)
    except (KeyboardInterrupt, Broken) as error:
        return type(error).__name__
    finally:
        if hook is not None:
            hook.remove()
    return "nothing"


def told_ranks(told: str) -> list[str]:
    """The error that every rank was told, "" for none. On the default group, which no cache uses: a rank in a forward hears nothing."""
    ranks = [""] * dist.get_world_size()
    dist.all_gather_object(ranks, told)
    return ranks


def main() -> None:
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    rank, report = dist.get_rank(), Report()
    model = tiny_model("qwen3_moe")
    for number in range(seed, seed + count):
        draw = random.Random(number)
        kind, victim, calls, distinct = draw.choice(KINDS), draw.randrange(2), draw.randrange(2, NEW_TOKENS - 1), draw.random() < 0.5
        ids = prompt(draw.randrange(5, 30), seed=number + (rank if distinct else 0))
        expected = generate(model, ids, new_tokens=NEW_TOKENS)
        block = {"timeout_s": 4.0, "page_size": 4, "storage": {"requests": "distinct" if distinct else "replicated"}}
        with report.check(str(number)) as row:
            row["kind"] = kind
            made, told = [], ""
            with pikv_ds.attach(model, block, dist.new_group()):
                try:
                    if rank == victim:
                        assert broken_off(model, ids, kind, calls) in ("KeyboardInterrupt", "Broken"), "it was not broken off"
                    else:
                        made.append(generate(model, ids, new_tokens=NEW_TOKENS))
                    made.append(generate(model, ids, new_tokens=NEW_TOKENS))
                except (PeerError, DivergedError) as error:
                    told = type(error).__name__
                ranks = told_ranks(told)
            if any(ranks):  # the group is one of caches that have ended; the ranks make another together
                with pikv_ds.attach(model, block, dist.new_group()):
                    made.append(generate(model, ids, new_tokens=NEW_TOKENS))
            where = f"{' and '.join(sorted({each for each in ranks if each}))}, then a fresh one on another group"
            row["outcome"] = where if any(ranks) else "a fresh one on the same group"
            row["requests"], row["told"] = block["storage"]["requests"], ranks
            for each in made:
                assert torch.equal(each.tokens, expected.tokens), "other tokens"
                assert each.difference(expected) <= 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
