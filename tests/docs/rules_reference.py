"""docs/reference/rules.md, from the table that `pikv config --rules` prints."""

from pikv_ds.launch.commands.config import rule_rows

from .tables import MADE, table

HEAD = f"""# What does not combine

{MADE}
Each rule is one refusal: what it refuses, why, and what to use instead. `pikv config --rules` prints the same. Asked in this order.
"""


def written() -> str:
    rows, parts = rule_rows(), [HEAD]
    for moment in dict.fromkeys(row["refused"] for row in rows):
        lines = [(f"`{x['rule']}`", x["blocks"], x["not"], x["because"], x["instead"]) for x in rows if x["refused"] == moment]
        parts += [f"## Refused {moment}\n", table(("rule", "blocks", "refused", "because", "instead"), lines)]
    return "\n".join(parts)
