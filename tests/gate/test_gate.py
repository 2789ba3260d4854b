"""The gate as a whole: the base is checked out and removed, every side runs its own tree, and the command reports what it measured."""

import ast
import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from tests.gate.rounds import SIDES, launches, order
from tests.gate.sides import Side, WorkerFailed
from tests.gate.trees import ROOT, NoBase, checked_out, git, is_checkout, resolve

in_a_checkout = pytest.mark.skipif(not is_checkout(), reason="no git checkout here, so there is no base to check out")


def test_rounds_are_balanced():
    rng = random.Random(0)
    drawn = [order(rng) for _ in range(300)]
    assert all(turns == turns[::-1] and Counter(turns) == dict.fromkeys(SIDES, 2) for turns in drawn)
    assert len(set(drawn)) == 6 and min(Counter(turns[0] for turns in drawn).values()) > 70


@pytest.mark.parametrize("pairs, parts", [(2, [2]), (19, [19]), (31, [11, 10, 10]), (61, [21, 20, 20])])
def test_launches_share_the_pairs(pairs, parts):
    assert launches(pairs) == parts


def test_what_steps_import_exists_in_the_base_too():
    """A script that moves files and follows their imports must not follow these: the base has the old places alone."""
    tree = ast.parse((ROOT / "tests" / "gate" / "decodes.py").read_text())
    found = {(n.module, a.name) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names if n.module.startswith("pikv_ds")}
    places = {("pikv_ds", "bundled"), ("pikv_ds", "PiKVConfig"), ("pikv_ds.cache", "PiKVCache")}
    assert found == places | {("pikv_ds.plan", "LocalStep"), ("pikv_ds.spec", "LayerSpec")}


@in_a_checkout
def test_the_base_is_checked_out_and_removed():
    head = resolve("HEAD")
    with pytest.raises(ZeroDivisionError), checked_out(head) as tree:
        assert subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tree, text=True).strip() == head
        assert (tree / "pikv_ds" / "__init__.py").is_file()
        _ = 1 / 0
    assert not tree.exists() and str(tree) not in git("worktree", "list")


@in_a_checkout
def test_an_unknown_base_is_refused():
    with pytest.raises(NoBase, match="--base 'no-such-commit' is no commit of this repository"):
        resolve("no-such-commit")


@pytest.mark.slow
def test_a_side_refuses_another_tree(tmp_path):
    with pytest.raises(WorkerFailed, match=rf"side 'base' ended.*(?s:.*)pikv_ds was imported from .*, not from {tmp_path}"):
        with Side("base", tmp_path, "exact", tmp_path) as side:
            side.ready()


@pytest.mark.slow
@in_a_checkout
def test_the_command(tmp_path):
    """HEAD against this tree, two pairs: what it says of speed is chance, so only the rest is looked at."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tests.gate", "--base", "HEAD", "--pairs", "2", "--only", "exact", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert document["machine"]["cores"] and document["versions"]["torch"]
    rows = document["rows"]
    assert done.returncode == int(rows[-1]["verdict"] == "FAILED") and len(rows) == 2 - (rows[0]["verdict"] == "passed")
    for row in rows:
        assert row["base"] == resolve("HEAD") and row["current"].startswith(row["base"]) and row["name"] == "exact"
        assert row["aa_same_output"], "two processes of one tree computed different numbers"
        for name in ("wall", "cpu", "aa_wall", "aa_cpu"):
            middle, low, high = row[name]
            assert len(row[f"{name}_ratios"]) == 2 and 0 < low <= middle <= high
        assert 0 < row["base_step_ms"] < 10_000
    assert "exact" in done.stdout and rows[-1]["verdict"].split(",")[0] in done.stdout
