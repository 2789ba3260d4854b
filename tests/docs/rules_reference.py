"""docs/reference/rules.md, from the table of rules."""

from pikv_ds.launch.commands.config import rule_rows

from .tables import MADE, table

HEAD = f"""# What does not combine

{MADE}
`pikv config --rules` prints the same. A refused block raises `ConfigError`, whose `rule` is the name below.
Everything that no rule names combines.
"""


def written() -> str:
    parts, rows = [HEAD], rule_rows()
    for moment in dict.fromkeys(row["refused"] for row in rows):
        parts.append(f"## Refused {moment}\n")
        cells = [
            (f"`{row['rule']}`", row["blocks"], row["not"], row["because"], row["instead"]) for row in rows if row["refused"] == moment
        ]
        parts.append(table(("rule", "blocks", "refused", "because", "instead"), cells))
    return "\n".join(parts)
