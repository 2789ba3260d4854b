"""What is known of each method: registries, the committed sweeps, the verdicts on them.

Verdicts (launch/sweeps/verdicts.json) are {FAMILY: {METHOD: [worth using, reason, models]}}, written by hand from the sweeps' results;
models: one of HOLDS_ON, the model or models whose rows say so. Columns that begin with "real" are of the real model (real_model.py).
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pikv_ds.launch.evaluation.sweep import read_sweep
from pikv_ds.launch.evaluation.sweep_table import records_of, shown

if TYPE_CHECKING:
    from pikv_ds.codecs.base import Codec

_CODEC_COLUMNS = ("page_size", "bytes_per_token", "k_error_bound", "v_error_bound")
RESULT_COLUMNS = (
    "measured as", "ppl_change_pct", "kl", "recall", "recall_after", "entries_read", "mass_recall", "compression", "attend path",
    "beside", "real_ppl_change_pct", "real_kl", "real_passkey", "real_passkey_after", "worth using", "holds on", "because",
)  # fmt: skip

HOLDS_ON = ("both", "bundled", "bundled; not on the real one", "real; not on the bundled one")


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
        self.real_sweep = {
            family: entries
            for name in ("real", "real_ranks") if (sweeps / f"{name}.json").is_file()
            for family, entries in read_sweep(sweeps / f"{name}.json")["families"].items()
        }  # fmt: skip
        self.real_rows = [row for name in ("real", "real_ranks") for row in _json(folder / f"{name}.json", {"rows": []})["rows"]]
        self.real = {family: self._in_order(family) for family in self.real_sweep}
        self.verdicts = _json(sweeps / "verdicts.json", {})
        self.records = {family: records_of(self.rows, family) for family in self.sweep}

    def _in_order(self, family: str) -> dict[str, Any]:
        """Records of the real model in the order of its list: rows are in the order in which they were measured."""
        records = records_of(self.real_rows, family)
        return {entry["label"]: records[entry["label"]] for entry in self.real_sweep[family]["entries"] if entry["label"] in records}

    def bundled_of(self, family: str, label: str) -> dict[str, Any] | None:
        """The bundled model's record of what the real model's list calls `label`; its ranks are of another width, and named otherwise."""
        (entry,) = (entry for entry in self.real_sweep[family]["entries"] if entry["label"] == label)
        return self.records.get(family, {}).get(entry.get("as", label))

    def on_both(self) -> list[tuple[str, str, dict[str, Any], dict[str, Any] | None]]:
        """Family, label, record of the real model, of the bundled one."""
        return [(family, label, record, self.bundled_of(family, label)) for family, of in self.real.items() for label, record in of.items()]

    def real_of_method(self, family: str, name: str) -> dict[str, Any]:
        """The columns of the real model, of a method's first configuration that was measured there."""
        for entry in self.real_sweep.get(family, {"entries": []})["entries"]:
            record = self.real.get(family, {}).get(entry["label"])
            if record is not None and entry["pikv"][family]["method"] == name:
                found, after = record["ruler"].get("passkey", (None, None))
                text = {"real_ppl_change_pct": record["ppl_change_pct"], "real_kl": record["kl"]}
                return text | {"real_passkey": found, "real_passkey_after": after}
        return {}

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
        worth, reason, models = self.verdicts.get(family, {}).get(name, (None, None, None))
        columns |= {"worth using": None if worth is None else "yes" if worth else "no", "because": reason, "holds on": models}
        columns |= self.real_of_method(family, name)
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


def part_rows() -> list[dict[str, Any]]:
    """One row per part that `pikv train` trains."""
    from pikv_ds.training.parts import PARTS

    rows = []
    for name, part in PARTS.items():
        parameters = [p for p in inspect.signature(part.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = ", ".join(f"{p.name}={p.default}" for p in parameters)
        what = inspect.getdoc(part).splitlines()[0]
        rows.append({"part": name, "serves": part.serves, "from": PARTS.origin(name), "options": options, "what": what})
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
