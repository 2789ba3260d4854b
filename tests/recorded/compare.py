"""Compare an outcome with the recorded one. Which facts hold where:

digest      bits of everything computed: the same CPU, torch and kernels only.
samples     equal there; elsewhere within the case's tolerance.
tokens, kept, read, numbers, collectives
            integers, words, counts: equal everywhere, but for the groups that a case names in `by_score`. There a choice between two
            scores may follow a rounding of the last bit, so they are compared on the same machine only; of the numbers those that
            follow from lengths alone (BY_LENGTH) are compared everywhere.
"""

import math

from tests.recorded.cases import Case

EXACT = ("tokens", "kept", "read", "numbers", "collectives")
OF_MACHINE = ("attention_impl",)  # names the kernels
BY_LENGTH = ("bytes_after_reset", "entries_appended", "kv_bytes_dense", "requests")


def differences(case: Case, found: list[dict], recorded: list[dict] | None, same_machine: bool) -> list[str]:
    """What differs, a line per rank and group of facts; found and recorded: outcomes by rank."""
    errors = [outcome["error"].strip().splitlines()[-1] for outcome in found if "error" in outcome]
    if errors:
        return [f"raised: {errors[0]}"]
    if case.refused is not None:
        return [] if all(case.refused in outcome.get("refused", "") for outcome in found) else [_not_refused(case, found[0])]
    refusals = [outcome["refused"] for outcome in found if "refused" in outcome]
    if refusals:
        return [f"refused: {refusals[0]}"]
    if recorded is None:
        return ["nothing is recorded under this name"]
    if len(recorded) != len(found):
        return [f"{len(found)} ranks, recorded were {len(recorded)}"]
    return [
        f"rank {rank}: {line}"
        for rank, (one, other) in enumerate(zip(found, recorded, strict=True))
        for line in _of_rank(case, one, other, same_machine)
    ]


def _not_refused(case: Case, found: dict) -> str:
    return f"expected an error with {case.refused!r}, got {found.get('refused', 'none')}"


def _of_rank(case: Case, found: dict, recorded: dict, same_machine: bool) -> list[str]:
    if same_machine:
        if found["digest"] == recorded["digest"]:
            bits = _unequal(found["samples"], recorded["samples"], "samples")
        else:
            bits = [f"bits, samples by up to {_furthest(found, recorded):.1e}"]
        return bits + [line for group in EXACT for line in _unequal(found[group], recorded[group], group)]
    lines = []
    if "samples" not in case.by_score and not _furthest(found, recorded) <= case.tolerance:
        lines.append(f"samples by up to {_furthest(found, recorded):.1e}, tolerance {case.tolerance:.0e}")
    for group in EXACT:
        sides = [_portable(group, outcome[group], group in case.by_score) for outcome in (found, recorded)]
        lines += _unequal(*sides, group)
    return lines


def _portable(group: str, facts, by_score: bool):
    """What of a group holds on every machine."""
    if group == "numbers":
        return {name: value for name, value in facts.items() if (name in BY_LENGTH if by_score else name not in OF_MACHINE)}
    return None if by_score else facts


def _unequal(found, recorded, name: str) -> list[str]:
    """Dictionaries key by key, so that it is seen which numbers moved."""
    if isinstance(found, dict) and isinstance(recorded, dict):
        return [line for key in sorted({*found, *recorded}) for line in _unequal(found.get(key), recorded.get(key), f"{name}.{key}")]
    return [] if found == recorded else [f"{name}: {_short(recorded)} -> {_short(found)}"]


def _furthest(found: dict, recorded: dict) -> float:
    """Largest difference of samples, relative where they are above 1; infinite where there are more of one than of the other, or NaN."""
    pairs = [found["samples"], recorded["samples"]]
    if len(pairs[0]) != len(pairs[1]):
        return math.inf
    apart = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(*pairs, strict=True)]
    return math.inf if any(map(math.isnan, apart)) else max(apart, default=0.0)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"
