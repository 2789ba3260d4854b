"""docs/reference/generate.md, from docs/results/generate_options.json."""

import json

from tests.generate_options.table import SETTINGS, TRIES, known
from tests.generate_options.table_results import COMMAND, FILE, OUTCOMES, of_option

from .tables import MADE, table

HEAD = """# Options of generate()

{made}
Each option of the pinned transformers ({version}), tried on an attached model beside plain transformers in the same process: sequences,
scores, logits, and the length of the cache that comes back must be the same. On 1 rank, and on 2 with distinct and with replicated
requests. The rows are `docs/results/generate_options.json`, made by `{command}`.

{counts}

"Raises, as without PiKV": transformers itself refuses it, as it has moved it to a repository of the Hub, or has no such model; attached
and plain raise the same.

`generate_batch` (continuous batching) has a cache of its own and is left to transformers.
"""


def written() -> str:
    results = json.loads(FILE.read_text(encoding="utf-8"))
    statuses = [one["status"] for one in results["tries"].values()]
    counts = ", ".join(f"{statuses.count(status)} {what}" for status, what in OUTCOMES.items())
    parts = [
        HEAD.format(
            made=MADE,
            version=results["transformers"],
            command=COMMAND,
            counts=f"{len(known())} options and arguments, {len(TRIES)} with what is handed on to the forward; {len(statuses)} tries in "
            f"{len(SETTINGS)} settings: {counts}.",
        )
    ]
    rows = []
    for option in TRIES:
        for one in of_option(results, option):
            tried = ", ".join(f"{name}={value!r}" for name, value in one["options"].items())
            rows.append((f"`{option}`", f"`{tried[:90] + '...' * (len(tried) > 90)}`" if tried else "", one["status"], one["says"][:160]))
    parts.append(table(("option", "tried", "outcome", "says"), rows))
    return "\n".join(parts)
