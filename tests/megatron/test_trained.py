"""Checkpoints as Megatron's own training leaves them: loaded in any layout, evaluated as by Megatron alone, refused without a trace."""

import json
import sys

import pytest
from megatron.core.transformer.moe import experts

from pikv_ds.bundled import model_path
from tests.dist.launcher import run_commands, run_gloo
from tests.long_form import LONG
from tests.megatron import JOBS
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(400), on_cpu]

SAVING = "1,2,1,1"  # tp,ep,etp,pp
TWO_RANKS = [SAVING, "2,1,1,1", *(["2,2,1,1", "1,1,1,2"] if LONG else [])]
EVALUATED = [layout for layout in TWO_RANKS if layout.endswith(",1")] if LONG else [SAVING]
KINDS = ["gpt-2", "shared experts", "gamma from one", "latent"]
KEYS = ["te", "te by layer", "singleton", "latent te", *(["grouped"] if hasattr(experts, "GroupedMLP") else [])]
# Ranks -> layouts that load what two ranks have saved, and the other way round.
WIDE = {4: ["2,2,1,2", "2,2,2,1", "1,4,1,1", "1,2,1,2"], 8: ["2,2,1,2", "4,2,1,1", "1,4,1,2", "2,4,1,1"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "saved"
    return folder, run_gloo(JOBS / "trained.py", [folder, "save", SAVING, *TWO_RANKS], ranks=2, timeout_s=200)


def test_it_is_trained_and_saved(trained):
    trained[1].check("trained and saved")


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_it_loads(trained, layout):
    trained[1].check(f"{layout} loads")


@pytest.mark.parametrize("layout", EVALUATED)
def test_pikv_evaluates_what_megatron_alone_does(trained, layout):
    trained[1].check(f"{layout} is evaluated")


def test_one_rank_loads_what_two_have_saved(trained):
    trained[1].check("trained and saved")
    job = run_gloo(JOBS / "trained.py", [trained[0], "1,1,1,1"], ranks=1, timeout_s=120)
    job.check("1,1,1,1 loads")
    job.check("1,1,1,1 is evaluated")


def test_a_failed_load_leaves_every_weight_as_it_was(trained):
    trained[1].check("trained and saved")
    job = run_gloo(JOBS / "refused_checkpoints.py", [SAVING, trained[0]], ranks=2, timeout_s=150)
    for name in ("damaged", "of another model", "one rank fails", "then it loads"):
        job.check(name)


def test_other_layers_keys(tmp_path):
    job = run_gloo(JOBS / "key_layouts.py", [tmp_path, SAVING, *KEYS], ranks=2, timeout_s=150)
    for name in KEYS:
        job.check(f"{SAVING} {name}")


@pytest.mark.parametrize(("ranks", "layout"), [(1, "1,1,1"), *([(2, "2,1,1"), (4, "2,2,1")] if LONG else [])])
def test_models_are_built_from_their_arguments(tmp_path, ranks, layout):
    kinds = KINDS[ranks == 4 :]  # the first has no experts to spread
    job = run_gloo(JOBS / "architectures.py", [tmp_path, layout, *kinds], ranks=ranks, timeout_s=150)
    for kind in kinds:
        job.check(f"{layout} {kind}")


@pytest.mark.skipif(not LONG, reason="the long form's: four and eight ranks")
@pytest.mark.parametrize("ranks", WIDE)
def test_wide_layouts(trained, tmp_path, ranks):
    trained[1].check("trained and saved")
    layouts = WIDE[ranks]
    job = run_gloo(JOBS / "trained.py", [trained[0], *layouts], ranks=ranks, timeout_s=380)
    for layout in layouts:
        job.check(f"{layout} loads")
    saving = layouts[0]
    wide = run_gloo(JOBS / "trained.py", [tmp_path / "wide", "save", saving, saving], ranks=ranks, timeout_s=380)
    wide.check(f"{saving} loads")
    narrow = run_gloo(JOBS / "trained.py", [tmp_path / "wide", *TWO_RANKS], ranks=2, timeout_s=200)
    for layout in TWO_RANKS:
        narrow.check(f"{layout} loads")


@pytest.mark.skipif(not LONG, reason="the long form's: four and eight ranks")
@pytest.mark.parametrize(("ranks", "layout"), [(4, "2,2,1,1"), (8, "2,2,2,2"), (8, "2,2,1,2")])
def test_other_layers_keys_on_more_ranks(tmp_path, ranks, layout):
    job = run_gloo(JOBS / "key_layouts.py", [tmp_path, layout, *KEYS], ranks=ranks, timeout_s=380)
    for name in KEYS:
        job.check(f"{layout} {name}")


@pytest.mark.skipif(not LONG, reason="the long form's: the commands as a user types them")
def test_the_command(trained, tmp_path):
    trained[1].check("trained and saved")
    words = ["--load", str(trained[0]), "--tokenizer", str(model_path()), "--context", "96", "--samples", "2", "--chunk", "4"]
    command = [sys.executable, "-m", "pikv_ds.launch.cli", "eval", "--backend", "megatron", "--ranks", "2", "--tasks", "ppl,bytes"]
    result = run_commands([[*command, *words, "--json", str(tmp_path / "rows.json")]], ranks=1, timeout_s=350)
    assert result.returncode == 0, result.describe()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"dense", "exact"} and {row["ep"] for row in rows} == {2}
    dense, exact = (next(row for row in rows if (row["method"], row["task"]) == (name, "ppl")) for name in ("dense", "exact"))
    assert exact["ppl"] == pytest.approx(dense["ppl"], rel=1e-5)
