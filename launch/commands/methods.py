"""`pikv methods`: every codec, router and retention policy, with what the committed sweep measured of it; and what can be trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from pikv_ds.launch.output import print_table, write_json

from .sweep import RESULTS, SWEEPS

_FORMS = {"ppl_change_pct": "+.2f", "kl": ".1e", "recall": ".2f", "recall_after": ".2f", "entries_read": ".3f", "mass_recall": ".2f"}
_FORMS |= {"real_ppl_change_pct": "+.2f", "real_kl": ".1e", "real_passkey": ".2f", "real_passkey_after": ".2f"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("methods", help="list codecs, routers and retention policies, and what was measured of them")
    parser.add_argument(
        "--doc", metavar="FILE", help="make the tables between the markers of docs/results/methods.md anew, and its figures"
    )


def run(args: argparse.Namespace) -> int:
    from pikv_ds.launch.evaluation.sweep_figures import write_figures, write_real_figure

    from ._methods_doc import written
    from ._methods_table import Results, method_rows, part_rows

    results = Results(RESULTS, SWEEPS)
    if args.doc:
        file = Path(args.doc)
        for figure in (*write_figures(RESULTS, results.rows), write_real_figure(RESULTS, results.on_both())):
            if figure is not None:
                print(f"wrote {figure.name}")
        file.write_text(written(file.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"tables of {file} are those of {len(results.rows)} rows")
        return 0
    rows = method_rows(results)
    for key in dict.fromkeys(row["key"] for row in rows):
        shown = [{name: _cell(name, value) for name, value in row.items() if name != "key"} for row in rows if row["key"] == key]
        names = [name for name in shown[0] if any(line[name] is not None for line in shown)]
        print_table(key, [{name: line[name] for name in names} for line in shown])
    parts = part_rows()
    print_table("pikv train PART", [{name: value for name, value in row.items() if value is not None} for row in parts])
    if not results.rows:
        where = "docs/results/methods.json is not there: make it with `pikv sweep --json docs/results/methods.json`"
        print("no results of a sweep: " + (where if RESULTS.is_dir() else "they are part of the repository, not of the wheel"))
    write_json(args.json, "methods", rows, parts=parts)
    return 0


def _cell(name: str, value):
    return format(value, _FORMS[name]) if value is not None and name in _FORMS else value
