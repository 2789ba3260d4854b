"""docs/reference/methods.md, from the registries, the committed sweep and the verdicts on it."""

from pikv_ds.launch.commands._methods_doc import beside_real
from pikv_ds.launch.commands._methods_table import Results, method_rows
from pikv_ds.launch.commands.sweep import RESULTS, SWEEPS

from .tables import MADE, table

FAMILIES = {"compression.method": "Codecs", "routing.method": "Routers", "scheduling.method": "Retention policies"}
HEAD = f"""# Methods

{MADE}
Every registered codec, router and retention policy. `pikv methods` prints the same with the methods of other distributions that are
installed. Options are keys beside `method`; an option without a value has no default.

"Worth using" is the verdict, "holds on" says on which model: the bundled one, with heads of 32, or SmolLM2-135M as well ("real").
Changes of perplexity are those of a method's first configuration on each model; the figures and the reasons are in
[results/methods.md](../results/methods.md) and [results/real.md](../results/real.md). What to start from is in
[choosing-a-method.md](../guide/choosing-a-method.md).
"""
CODECS = """Bytes are per token and layer for bf16 keys and values of 8 heads of 128, scales included, without position and raw tail.
Calibrated codecs are shown at half the width, or at the least they need for random numbers. A bound is the largest relative error of any
entry that the codec declares; that of a calibrated one depends on the model.
"""


def written() -> str:
    rows = [row for row in method_rows(Results(RESULTS, SWEEPS)) if row["from"] is None or row["from"].startswith("pikv")]
    parts = [HEAD]
    for key, title in FAMILIES.items():
        parts += [f"## {title}\n", f"`{key}`.\n", *([CODECS] if key == "compression.method" else [])]
        parts.append(table(*_table([row for row in rows if row["key"] == key], key == "compression.method")))
    return "\n".join(parts)


def _table(rows: list[dict], codecs: bool) -> tuple[tuple[str, ...], list[tuple]]:
    head, lines = ("method", "options", "what", "worth using", "holds on", "ppl %: bundled", "real"), []
    for row in rows:
        sized = (
            [row["page_size"], f"{row['bytes_per_token']:,.0f}", _bound(row["k_error_bound"]), _bound(row["v_error_bound"])]
            if codecs
            else []
        )
        options = ", ".join(f"`{option}`" for option in row["options"].split(", ") if option)
        verdict = (row["worth using"] or "not judged", row["holds on"] or "-", *list(beside_real(row).values())[:2])
        lines.append((f"`{row['name']}`", options or "-", row["what"], *verdict, *sized))
    return (*head, *(("page size", "bytes", "K bound", "V bound") if codecs else ())), lines


def _bound(error: float | None) -> str:
    return "of the model" if error is None else f"{error:.1e}" if error else "0"
