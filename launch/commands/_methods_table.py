"""What is known of each method: registries, the committed sweep, the verdicts on it, and the tables of docs/results/methods.md.

Verdicts (launch/sweeps/verdicts.json) are {FAMILY: {METHOD: [worth using, reason]}}, written by hand from the sweep's results.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pikv_ds.launch.evaluation.sweep import read_sweep
from pikv_ds.launch.evaluation.sweep_table import families_of, records_of, shown

if TYPE_CHECKING:
    from pikv_ds.codecs.base import Codec

_CODEC_COLUMNS = ("page_size", "bytes_per_token", "k_error_bound", "v_error_bound")
RESULT_COLUMNS = (
    "measured as", "ppl_change_pct", "kl", "recall", "recall_after", "entries_read", "mass_recall", "compression", "attend path",
    "beside", "worth using", "because",
)  # fmt: skip


def registries() -> dict[str, Any]:
    from pikv_ds.codecs import CODECS
    from pikv_ds.placement.rules import PLACEMENTS
    from pikv_ds.policies import POLICIES
    from pikv_ds.pools import POOLS
    from pikv_ds.routers import ROUTERS

    return {"compression": CODECS, "routing": ROUTERS, "scheduling": POLICIES, "pools": POOLS, "storage": PLACEMENTS}


class Results:
    """The sweeps and the verdicts of the package, and their rows; no rows where the repository's docs/results is not there (a wheel)."""

    def __init__(self, folder: Path, sweeps: Path) -> None:
        self.folder = folder
        self.sweep: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        for name in ("methods", "stacked"):
            if (sweeps / f"{name}.json").is_file():
                self.sweep |= read_sweep(sweeps / f"{name}.json")["families"]
            self.rows += _json(folder / f"{name}.json", {"rows": []})["rows"]
        self.real_rows = [row for file in sorted(folder.glob("real_*.json")) for row in _json(file, {"rows": []})["rows"]]
        """Of the real model, by the same labels."""
        self.real = {family: records_of(self.real_rows, family) for family in families_of(self.real_rows)}
        self.verdicts = _json(sweeps / "verdicts.json", {})
        self.records = {family: records_of(self.rows, family) for family in self.sweep}

    def method_of(self, family: str, label: str) -> str:
        (entry,) = (entry for entry in self.sweep[family]["entries"] if entry["label"] == label)
        return entry["pikv"].get("preset") if family == "presets" else entry["pikv"][family]["method"]

    def beside(self, family: str, label: str) -> str | None:
        (entry,) = (entry for entry in self.sweep[family]["entries"] if entry["label"] == label)
        return entry.get("beside")

    def control(self, family: str, label: str) -> str | None:
        """The control of a configuration and the figures that tell them apart."""
        name = self.beside(family, label)
        record = self.records[family].get(name)
        if record is None:
            return name
        cells = shown(record)
        figures = {"ppl": cells["ppl change %"] and f"{cells['ppl change %']} %", "recall": cells["recall"], "mass": cells["mass"]}
        if family != "routing":
            figures.pop("mass")
        return f"{name} ({', '.join(f'{key} {value}' for key, value in figures.items() if value)})"

    def of_method(self, family: str, name: str) -> dict[str, Any]:
        """RESULT_COLUMNS of the first configuration of a method; None where nothing is known."""
        columns: dict[str, Any] = dict.fromkeys(RESULT_COLUMNS)
        worth, reason = self.verdicts.get(family, {}).get(name, (None, None))
        columns |= {"worth using": None if worth is None else "yes" if worth else "no", "because": reason}
        labels = [label for label in self.records.get(family, {}) if self.method_of(family, label) == name]
        if not labels:
            return columns
        record = self.records[family][labels[0]]
        columns |= {key: record[key] for key in RESULT_COLUMNS if key in record}
        return columns | {
            "measured as": labels[0], "attend path": attend_path(record["attention"]), "beside": self.control(family, labels[0])
        }  # fmt: skip


def attend_path(attention_impl: str) -> str:
    return "torch" if " torch " in f"{attention_impl} " else "compiled"


def _json(file: Path, absent: Any) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else absent


def method_rows(results: Results) -> list[dict[str, Any]]:
    """One row per method: its key in the "pikv" block, its options, what it does; for codecs also bytes and declared errors; results."""
    rows = []
    for family, registry in registries().items():
        for name, method in registry.items():
            parameters = inspect.signature(method.__init__).parameters.values()
            options = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters if p.kind is p.KEYWORD_ONLY]
            size = _codec_columns(method) if family == "compression" else dict.fromkeys(_CODEC_COLUMNS)
            rows.append(
                {
                    "key": "storage.placement" if family == "storage" else f"{family}.method",
                    "name": name,
                    "from": registry.origin(name),
                    "options": ", ".join(options),
                    **size,
                    **results.of_method(family, name),
                    "what": inspect.getdoc(method).splitlines()[0],
                }
            )
    return rows


def _codec_columns(method: type[Codec]) -> dict[str, Any]:
    """For bf16 keys and values of 8 heads x 128, a page without its raw tail. Calibrated codecs: at half the width, or the least that they
    need for random numbers; their errors depend on the model, `pikv calibrate` says them."""
    import torch

    from pikv_ds.codecs.base import Heads
    from pikv_ds.spec import LayerSpec

    draw = lambda heads: torch.randn(256, heads, 128, generator=torch.Generator().manual_seed(heads))  # noqa: E731
    codec = method.example([Heads(draw(32), draw(8), draw(8))])
    page_size, spec = codec.page_size(None), LayerSpec(layer_idx=0, num_kv_heads=8, k_dim=128, v_dim=128)
    fmt = codec.page_format(spec, page_size, torch.bfloat16)
    errors = [None if codec.calibrated else round(error, 4) for error in codec.declared_errors(spec, page_size, torch.bfloat16)]
    return dict(zip(_CODEC_COLUMNS, (page_size, fmt.bytes_per_token, *errors), strict=True))


# ---- docs/results/methods.md ---------------------------------------------------------------------------------------------------------

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


def _on_real(results: Results, family: str) -> list[str]:
    """Of the real model, beside the bundled one: columns that some configuration has."""
    records = results.real.get(family, {})
    tasks = list(dict.fromkeys(task for record in records.values() for task in record["ruler"]))
    lines = []
    for label, record in records.items():
        cells, bundled = shown(record), results.records.get(family, {}).get(label)
        line = {"configuration": label} | {name: cells[name] for name in ("bytes/token", "2-byte cache / it", "ppl change %")}
        line["bundled model, ppl change %"] = bundled and shown(bundled)["ppl change %"]
        line |= {name: cells[name] for name in ("KL", "entries read", "mass")}
        for task in tasks:
            found, after = record["ruler"].get(task, (None, None))
            line[task] = None if found is None else f"{found:.2f}" if after is None else f"{found:.2f} / {after:.2f}"
        lines.append(line)
    empty = {name for name in (lines[0] if lines else ()) if all(line[name] is None for line in lines)}
    return markdown([{name: cell or "-" for name, cell in line.items() if name not in empty} for line in lines])


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
        lines.append({"method": f"`{name}`", "worth using": known["worth using"] or "not judged", "because": known["because"] or "-"})
    return markdown(lines)


def markdown(lines: list[dict[str, str]]) -> list[str]:
    if not lines:
        return ["Not measured yet."]
    row = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return [row(lines[0]), row(["---"] * len(lines[0])), *(row(line.values()) for line in lines)]
