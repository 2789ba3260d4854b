"""docs/reference/hosts.md, from the rows of docs/results/hosts.json (tests/hosts)."""

from tests.hosts.claims import claimed, found, pins, requirements
from tests.hosts.matrix import HOSTS, SMOKE

from .tables import MADE, table

HEAD = """# Which versions of the hosts run

{made}
The rows are those of `docs/results/hosts.json`, which `bash launch/dev.sh hosts` measures: each version in an environment of its own, with
everything else as pinned ({machine}). What setup.py claims has passed, and what passed is claimed (a test compares them); below the range
`attach` refuses a version by name, above it it warns once and refuses only where something that it hooks into is missing.

{claims}
What a row has run, each a test or a program of this repository:

{smoke}
"""
WHAT = {
    "attach": "nine tiny families: greedy tokens and logits over PiKV against the ordinary cache, `cache=` and `past_key_values=`",
    "autoep": "DeepSpeed's launcher and AutoEP on 2 gloo ranks: text of three families, and nothing left patched",
    "static engine": "Megatron's StaticInferenceEngine on 2 gloo ranks: EP, TP, TP x EP",
    "dynamic": "DynamicInferenceContext on 2 gloo ranks, driven step by step",
    "checkpoint": "dist_checkpointing saved in one layout, loaded in three; what Megatron's training saved, evaluated; other layers' keys",
    "features": "windows, sinks, masks, routing variants, refusals and the host's own limits; hybrid stacks: 2 gloo ranks",
    "engines": "over `install()`, 2 gloo ranks: DynamicInferenceEngine, its coordinator and client, MegatronLLM and MegatronAsyncLLM "
    "(from 0.18 on), unedited scripts",
}


def written() -> str:
    results = found()
    claims = []
    for host in HOSTS:
        for python in results["hosts"][host]["releases"]:
            claim = claimed(host, python, requirements())
            shown = "not asked for" if claim is None else f"`{','.join(sorted(map(str, claim), reverse=True))}`"
            claims.append((host, python, shown, pins(python).get(host, "")))
    head = HEAD.format(
        made=MADE,
        machine=results["machine"],
        claims=table(("host", "Python", "claimed by setup.py", "pinned"), claims),
        smoke=table(("name", "what"), [(name, WHAT[name]) for name in SMOKE]),
    )
    parts = [head]
    for host in HOSTS:
        rows = [
            (row["version"], row["python"], row["torch"], row["result"], ", ".join(row["smoke"]), row["cause"])
            for row in results["hosts"][host]["rows"]
        ]
        parts.append(f"## {host}\n\n" + table(("version", "Python", "torch", "result", "what ran", "first cause"), rows))
    return "\n".join(parts)
