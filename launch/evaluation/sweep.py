"""A sweep file: families of labelled configurations, and the runs in which each of them is measured.

{"files": {NAME: {"command": [...]}},
 "families": {FAMILY: {"quick": {OPTION: VALUE, ...},
                       "runs": [{"options": {OPTION: VALUE, ...}, "tasks": [...], "pikv": {...}, "of": [LABEL, ...]}, ...],
                       "entries": [{"label": TEXT, "pikv": {...}, "beside": LABEL}, ...]}}}

Every entry is measured in every run of its family, its block laid on the run's `pikv`; the dense cache once per set of options. `options`
are those of `pikv eval`; `of` (default: all) names the entries of a run. `beside` is the label of the control. "{NAME}" in a block or an
option is a file or a folder NAME that the sweep makes first, with that command.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pikv_ds.bundled import model_path
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.launch.real_model import KINDS, find

from .plan import read_spec
from .spec import TASKS, EvalSpec, Unit

DENSE = "dense"
QUICK_ENTRIES = 2  # of each family


class Item(NamedTuple):
    """One unit of a sweep and what it is for. family and label are None for the dense cache, which serves all families."""

    family: str | None
    label: str
    spec: EvalSpec
    unit: Unit


def read_sweep(file: Path) -> dict[str, Any]:
    """Raises: FileNotFoundError, ConfigError for what is not a sweep."""
    if not file.is_file():
        raise FileNotFoundError(
            f"no sweep file {str(file)!r}; name a file, or for `pikv sweep` one of launch/sweeps by its name (methods, stacked)"
        )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("families"), dict):
        raise ConfigError(f'{file} is not a sweep of families: legal is {{"families": {{NAME: {{"runs": [...], "entries": [...]}}}}}}')
    for name, family in document["families"].items():
        labels = [entry["label"] for entry in family["entries"]]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"{file}, family {name!r}: the label {label!r} stands twice")
        known = {*labels, DENSE}
        for named in [entry.get("beside", DENSE) for entry in family["entries"]] + [x for run in family["runs"] for x in run.get("of", ())]:
            if named not in known:
                raise ConfigError(f"{file}, family {name!r}: no entry has the label {named!r}; legal are {', '.join(sorted(known))}")
    return document


def items_of(
    document: dict[str, Any],
    only: Sequence[str] | None,
    quick: bool,
    parse_eval: Any,
    made: dict[str, str],
    model: str | None = None,
    context: int | None = None,
) -> list[Item]:
    """What to measure, in the order of the file, each unit once.

    Args: only: names of families, None = all. quick: little of everything. parse_eval: list of words of `pikv eval` -> its arguments.
        made: paths of the files that the sweep makes. model: the folder of runs that name none; None = the bundled model.
        context: in place of that of runs which measure more than bytes.
    """
    families = document["families"]
    for name in only or ():
        if name not in families:
            raise ConfigError(f"--only {name!r}: the families of this sweep are {', '.join(families)}")
    items: dict[tuple, Item] = {}
    for name in only or families:
        family = families[name]
        for run in family["runs"]:
            options = ({"model": model} if model else {}) | run["options"] | (family.get("quick", {}) if quick else {})
            options |= {"context": context} if context and run["tasks"] != ["bytes"] else {}
            spec = _spec(_fill(options, made), run["tasks"], parse_eval)
            entries = [entry for entry in family["entries"] if entry["label"] in run.get("of", [entry["label"]])]
            chosen = [(None, DENSE, None)]
            chosen += [(name, entry["label"], _block(name, entry, run, made)) for entry in entries[: QUICK_ENTRIES if quick else None]]
            for task in run["tasks"]:
                for family_name, label, block in chosen:
                    item = Item(family_name, label, spec, Unit(task=task, block=block))
                    items.setdefault((family_name, label, spec, task, json.dumps(block)), item)
    return list(items.values())


def _spec(options: dict[str, Any], tasks: list[str], parse_eval: Any) -> EvalSpec:
    if any(task not in TASKS for task in tasks):
        raise ConfigError(f"tasks {tasks}: legal are {', '.join(TASKS)}")
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return read_spec(parse_eval(["eval", *words, "--tasks", ",".join(tasks)]))[0]


def _block(family: str, entry: dict[str, Any], run: dict[str, Any], made: dict[str, str]) -> dict[str, Any]:
    try:
        return PiKVConfig.parse(_fill(_lay_under(run.get("pikv", {}), entry["pikv"]), made)).model_dump(mode="json")
    except ConfigError as error:
        raise ConfigError(f"sweep entry {family}/{entry['label']}: {error}") from None


def _lay_under(base: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """The block, and what the run says where the block is silent."""
    inner = {key: _lay_under(base[key], value) for key, value in block.items() if isinstance(value, dict) and key in base}
    return base | block | inner


def _fill(value: Any, made: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item, made) for key, item in value.items()}
    if isinstance(value, str) and value.startswith("{") and value.endswith("}"):
        return made[value[1:-1]]
    return value


def files_needed(document: dict[str, Any], only: Sequence[str] | None, quick: bool) -> dict[str, list[str]]:
    """The files that the chosen families refer to, or with `quick` those of their entries that it measures; the commands that make them."""
    families = [family for name, family in document["families"].items() if not only or name in only]
    text = json.dumps([family | {"entries": family["entries"][: QUICK_ENTRIES if quick else None]} for family in families])
    return {name: made["command"] for name, made in document.get("files", {}).items() if f'"{{{name}}}"' in text}


def sweep_row(item: Item, row: dict[str, Any]) -> dict[str, Any]:
    """A row of `pikv eval` that also says which entry of the sweep it is, and on which model."""
    return row | {"detail": {"family": item.family, "label": item.label, "model": model_name(Path(item.spec.model))} | row["detail"]}


def model_name(path: Path) -> str:
    """What rows call a model: its folder's name, but for those that come with the package or are made by it."""
    if path == model_path():
        return "bundled"
    made = {find(kind): kind for kind in KINDS}
    return f"smollm2 {made[path]}" if path in made else path.name
