"""The rows of a sweep, one record per configuration: what `pikv sweep`, `pikv methods` and docs/results/methods.md show of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .spec import RULER

Row = dict[str, Any]

QUALITY = ("ppl_change_pct", "kl", "mass_recall", "entries_read")


def families_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["detail"]["family"] for row in rows if row["detail"]["family"] is not None))


def records_of(rows: Sequence[Row], family: str) -> dict[str, Row]:
    """One record per label. Figures of text come from the shortest context it was measured at, bytes from the longest.

    Keys: config, attention, ppl_change_pct, kl, mass_recall, entries_read, ppl_change_long_pct (and long_context), recall, recall_after,
    bytes_per_token, compression, bytes_context, compression_other (of another model), ranks, rank_ratio (2-byte dense cache of a rank /
    the fullest rank's bytes), agreement; None where not measured. The model is the bundled one, where rows are of it, else that of the
    first row. RULER's tasks: {task: (found, found with the question after eviction or None)}.
    """
    own: dict[str, list[Row]] = {}
    for row in rows:
        if row["detail"]["family"] == family:
            own.setdefault(row["detail"]["label"], []).append(row)
    return {label: _record(of_label) for label, of_label in own.items()}


def _record(rows: Sequence[Row]) -> Row:
    models = [row["detail"]["model"] for row in rows]
    of = "bundled" if "bundled" in models else models[0]
    bundled = [row for row in rows if row["detail"]["model"] == of]
    other = [row for row in rows if row["detail"]["model"] != of]
    texts = sorted((row for row in bundled if row["task"] == "ppl"), key=lambda row: row["context"])
    facts = [row for row in bundled if row["task"] == "recall"]
    # Same context: the row of the task that only measures bytes comes last.
    order = lambda row: (row["context"], row["task"] == "bytes", row["task"] not in RULER, row["task"] == "recall")  # noqa: E731
    sized = sorted(bundled, key=order)[-1]
    record = {"config": sized["config"], "attention": sized["attention_impl"]}
    record |= {name: texts[0][name] if texts else None for name in QUALITY}
    longer = texts[-1] if len({row["context"] for row in texts}) > 1 else None
    record |= {"ppl_change_long_pct": longer and longer["ppl_change_pct"], "long_context": longer and longer["context"]}
    found, after = _found(facts[0]) if facts else (None, None)
    record |= {"recall": found, "recall_after": after}
    record["ruler"] = {row["task"]: _found(row) for row in bundled if row["task"] in RULER}
    record["agreement"] = next((row["detail"]["agreement"] for row in bundled if row["task"] == "agreement"), None)
    record |= {"bytes_per_token": sized["bytes_per_token"], "compression": sized["compression"], "bytes_context": sized["context"]}
    record |= {"ranks": sized["ranks"], "rank_ratio": _rank_ratio(sized) if sized["ranks"] > 1 else None}
    return record | {"compression_other": other[0]["compression"] if other else None}


def _found(row: Row) -> tuple[float, float | None]:
    after = row["detail"].get("found_question_after_eviction")
    return row["recall"], after and after[0] / after[1]


def _rank_ratio(row: Row) -> float:
    """2-byte elements of an ordinary cache of the same requests on one rank / bytes of the fullest rank. Requests are replicated."""
    ordinary = row["compression"] * row["bytes_per_token"] * row["detail"]["tokens_in_cache"]
    return ordinary / max(row["kv_bytes_per_rank"])


def table_of(rows: Sequence[Row], family: str) -> list[dict[str, Any]]:
    """For the terminal: formatted, without columns that no record has."""
    records = records_of(rows, family)
    table = [{"configuration": label} | shown(record) for label, record in records.items()]
    empty = {name for name in table[0] if all(line[name] is None for line in table)}
    return [{name: value for name, value in line.items() if name not in empty} for line in table]


FORMS = {
    "ppl_change_pct": ("ppl change %", "+.2f"), "ppl_change_long_pct": ("ppl change %, long", "+.2f"), "kl": ("KL", ".1e"),
    "recall": ("recall", ".2f"), "recall_after": ("asked after eviction", ".2f"), "entries_read": ("entries read", ".3f"),
    "mass_recall": ("mass", ".2f"), "bytes_per_token": ("bytes/token", ",.0f"), "compression": ("2-byte cache / it", ".2f"),
    "compression_other": ("width 128", ".2f"), "rank_ratio": ("2-byte dense rank / fullest rank", ".1f"), "attention": ("attention", ""),
}  # fmt: skip


def shown(record: Row) -> dict[str, str | None]:
    cells = {title: None if record[name] is None else format(record[name], form) for name, (title, form) in FORMS.items()}
    if record["kl"] is not None and abs(record["kl"]) < 1e-8:
        cells["KL"] = "< 1e-8"
    return {title: "+0.00" if cell == "-0.00" else cell for title, cell in cells.items()}
