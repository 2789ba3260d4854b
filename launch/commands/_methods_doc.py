"""The tables and verdicts of docs/results/methods.md and docs/results/real.md, made from the committed rows."""

from __future__ import annotations

import re
from typing import Any

from pikv_ds.launch.evaluation.sweep_table import shown

from ._methods_table import Results, registries

_TABLE_COLUMNS = {
    "compression": ("bytes/token", "2-byte cache / it", "width 128", "ppl change %", "ppl change %, long", "KL", "recall", "attention"),
    "routing": ("entries read", "mass", "ppl change %", "KL", "recall", "bytes/token"),
    "scheduling": ("ppl change %", "KL", "recall", "asked after eviction", "bytes/token"),
    "presets": ("ppl change %", "KL", "recall", "2-byte cache / it"),
    "together": ("2-byte cache / it", "ppl change %", "KL", "recall", "asked after eviction", "entries read", "attention"),
    "ranks": ("2-byte dense rank / fullest rank", "ppl change %", "KL", "recall", "asked after eviction", "bytes/token", "attention"),
    "selected": ("2-byte dense rank / fullest rank", "entries read", "mass", "ppl change %", "KL", "recall", "attention"),
    "megatron": ("ppl change %", "KL", "recall", "2-byte cache / it", "attention"),
}
_MARKED = re.compile(r"(<!-- (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str, results: Results) -> str:
    """The text of docs/results/methods.md with what stands between its markers made anew: `<!-- table FAMILY -->`,
    `<!-- verdicts FAMILY -->` or `<!-- figure NAME -->`; and `<!-- real FAMILY -->` of docs/results/real.md."""
    makers = {"table": _configurations, "verdicts": _verdicts, "figure": _figure, "real": _on_real}
    return _MARKED.sub(lambda found: found[1] + "\n".join(makers[found[2]](results, found[3])) + "\n" + found[4], text)


def _configurations(results: Results, family: str) -> list[str]:
    lines = []
    for label, record in results.records[family].items():
        cells = shown(record)
        line = {"configuration": label} | {name: cells[name] or "-" for name in _TABLE_COLUMNS[family]}
        line |= _claims(label) if family == "presets" else {"beside": results.control(family, label) or "-"}
        lines.append(line)
    return markdown(lines)


_REAL_COLUMNS = ("bytes/token", "2-byte cache / it", "ppl change %")
_REAL_RANKS = ("2-byte dense rank / fullest rank", "bytes/token", "ppl change %")


def _on_real(results: Results, family: str) -> list[str]:
    """Of the real model, beside the bundled one: columns that some configuration has."""
    records = results.real.get(family, {})
    tasks = list(dict.fromkeys(task for record in records.values() for task in record["ruler"]))
    lines = []
    for label, record in records.items():
        cells, bundled = shown(record), results.bundled_of(family, label) if family != "ranks" else None
        line = {"configuration": label} | {name: cells[name] for name in (_REAL_RANKS if family == "ranks" else _REAL_COLUMNS)}
        line["bundled model, ppl change %"] = bundled and shown(bundled)["ppl change %"]
        line |= {name: cells[name] for name in ("KL", "entries read", "mass")}
        line |= {task: _found(*record["ruler"].get(task, (None, None))) for task in tasks}
        lines.append(line)
    empty = {name for name in (lines[0] if lines else ()) if all(line[name] is None for line in lines)}
    return markdown([{name: cell or "-" for name, cell in line.items() if name not in empty} for line in lines])


def _found(found: float | None, after: float | None) -> str | None:
    """Found, and after a slash with the question asked after eviction."""
    return None if found is None else f"{found:.2f}" if after is None else f"{found:.2f} / {after:.2f}"


def _claims(name: str) -> dict[str, str]:
    from pikv_ds.config.presets import PRESETS

    preset = PRESETS[name]
    spans = [span and ("-".join(f"{x:g}" for x in dict.fromkeys(span))) for span in (preset.claimed_drop_pct, preset.claimed_ratio)]
    return {"claimed drop %": spans[0] or "-", "claimed ratio": spans[1] or "-", "what": preset.what}


def _figure(results: Results, name: str) -> list[str]:
    return [f"![{name}]({name}.png)" if (results.folder / f"{name}.png").is_file() else "Not drawn yet."]


def _verdicts(results: Results, family: str) -> list[str]:
    lines = []
    for name in registries()[family].names():
        known = results.of_method(family, name)
        if not known["measured as"] and not known["worth using"]:
            continue
        line = {"method": f"`{name}`", "worth using": known["worth using"] or "not judged", "holds on": known["holds on"] or "-"}
        lines.append(line | beside_real(known) | {"because": known["because"] or "-"})
    return markdown(lines)


def beside_real(known: dict[str, Any]) -> dict[str, str]:
    """Columns that set the two models beside each other: change of perplexity, facts; of a method's first configuration on each."""
    change = lambda value: "-" if value is None else shown_change(value)  # noqa: E731
    return {
        "ppl change %": change(known["ppl_change_pct"]),
        "real: ppl change %": change(known["real_ppl_change_pct"]),
        "recall": _found(known["recall"], known["recall_after"]) or "-",
        "real: pass key": _found(known["real_passkey"], known["real_passkey_after"]) or "-",
    }


def shown_change(value: float) -> str:
    text = format(value, "+.2f")
    return "+0.00" if text == "-0.00" else text


def markdown(lines: list[dict[str, str]]) -> list[str]:
    if not lines:
        return ["Not measured yet."]
    row = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return [row(lines[0]), row(["---"] * len(lines[0])), *(row(line.values()) for line in lines)]
