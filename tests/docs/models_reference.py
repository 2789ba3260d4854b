"""docs/reference/models.md, from the rows of the survey (tests/survey)."""

import json
from collections import Counter

from tests.survey.results import NEWEST, RESULTS, SURVEYED

from .tables import MADE, table

HEAD = """# Which models are served

{made}
The rows are those of `docs/results/survey.json`, which `python -m tests.survey --write docs/results/survey.json` measures: every class that
`AutoModelForCausalLM` of transformers {transformers} knows, as a tiny random model in f32 whose configuration is made by rule.

Each generates twelve tokens for two prompts, one of them padded, with its own DynamicCache and then attached, with one shard and with two.
Served: the same tokens, and logits within {tolerance} of prefill and steps. Refused: an error that says why. Wrong would be anything else.

{counted}
"""


def written() -> str:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = found["rows"]
    counts = Counter(row["outcome"] for row in rows)
    surveyed = sum(counts[outcome] for outcome in SURVEYED)
    counted = table(
        ("outcome", "families"),
        [("generate with a DynamicCache", surveyed), *((name, counts[name]) for name in SURVEYED), ("do not", counts["not in it"])],
    )
    head = HEAD.format(made=MADE, counted=counted, tolerance=found["tolerance"], transformers=found["versions"]["transformers"])
    found_served = (row for row in rows if row["outcome"] == "served")
    served = table(("family", "class", "pages are read by"), [(f"`{r['family']}`", r["class"], r["attention"]) for r in found_served])
    others = [
        (title, table(("family", "why"), [(f"`{row['family']}`", row["why"]) for row in rows if row["outcome"] == outcome]))
        for title, outcome in (("Wrong", "wrong"), ("Refused", "refused"), ("Not among them", "not in it"))
        if counts[outcome]
    ]
    newest = json.loads(NEWEST.read_text(encoding="utf-8"))
    outcomes = ((f"`{row['family']}`", row["outcome"], row["why"]) for row in newest["rows"])
    others.append((f"New in transformers {newest['versions']['transformers']}", table(("family", "outcome", "why"), outcomes)))
    return "\n".join([head, "## Served\n", served, *(f"## {title}\n\n{text}" for title, text in others)])
