"""Compare an outcome with the recorded one. Which facts hold where:

digest      bits of everything computed: the same CPU, torch and kernels only.
samples     equal there; elsewhere within the case's tolerance.
tokens, kept, read, numbers, collectives
            integers, words, counts: equal everywhere, but for the groups that a case names in `by_score`: there a choice between two
            numbers follows a rounding of the last bit, and they are compared on the same CPU only.
"""

from tests.recorded.cases import Case

EXACT = ("tokens", "kept", "read", "numbers", "collectives")
OF_MACHINE = ("attention_impl",)  # numbers that name the kernels


def differences(case: Case, found: list[dict], recorded: list[dict] | None, same_machine: bool) -> list[str]:
    """What differs, a line per rank and group of facts; found and recorded: outcomes by rank."""
    errors = [outcome["error"].strip().splitlines()[-1] for outcome in found if "error" in outcome]
    if errors:
        return [f"raised: {errors[0]}"]
    if case.refused is not None:
        return [] if all(case.refused in outcome.get("refused", "") for outcome in found) else [_not_refused(case, found[0])]
    if "refused" in found[0]:
        return [f"refused: {found[0]['refused']}"]
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
    lines = []
    if same_machine and found["digest"] != recorded["digest"]:
        lines.append(f"bits; samples differ by up to {_furthest(found['samples'], recorded['samples']):.1e}")
    elif not _close(found["samples"], recorded["samples"], 0 if same_machine else case.tolerance):
        lines.append(f"samples, by up to {_furthest(found['samples'], recorded['samples']):.1e}")
    for group in EXACT:
        if same_machine or group not in case.by_score:
            lines += [f"{group}{what}" for what in _unequal(found[group], recorded[group], () if same_machine else OF_MACHINE)]
    return lines


def _unequal(found, recorded, ignored: tuple[str, ...]) -> list[str]:
    """Dictionaries key by key, so that it is seen which numbers moved."""
    if not isinstance(found, dict) or not isinstance(recorded, dict):
        return [] if found == recorded else [f": {_short(recorded)} -> {_short(found)}"]
    names = [name for name in sorted({*found, *recorded}) if name not in ignored]
    return [f".{name}{line}" for name in names for line in _unequal(found.get(name), recorded.get(name), ())]


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"


def _furthest(found: list[float], recorded: list[float]) -> float:
    """Largest difference, over 1 where numbers are larger than 1; infinite where there are more of one than of the other, or NaN."""
    if len(found) != len(recorded):
        return float("inf")
    apart = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, recorded, strict=True)]
    return float("inf") if any(x != x for x in apart) else max(apart, default=0.0)


def _close(found: list[float], recorded: list[float], tolerance: float) -> bool:
    return _furthest(found, recorded) <= tolerance
