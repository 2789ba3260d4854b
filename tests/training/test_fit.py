"""The loop: a resumed fit is the fit, it stops when it should, and bad input is refused by name."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from pikv_ds.errors import TrainingError
from pikv_ds.training.fit import FitPlan, fit
from pikv_ds.training.order import window_at
from tests.training.windows import Mean, engine_of, windows


def plan(folder, **more) -> FitPlan:
    return FitPlan(**{"steps": 12, "every": 4, "seed": 5, "folder": folder, **more})


class Killed(Exception):
    pass


def kill_after(step: int):
    def told(row):
        if row["step"] == step:
            raise Killed

    return told


@pytest.mark.parametrize("killed_after", [3, 5, 8])
def test_killed_and_resumed_is_the_same_fit(tmp_path, killed_after):
    whole = fit(Mean(), engine_of(Mean(), 12), windows(5), windows(2, 50), plan(tmp_path / "whole"))
    part = Mean()
    with pytest.raises(Killed):
        fit(part, engine_of(part, 12), windows(5), windows(2, 50), plan(tmp_path / "cut"), kill_after(killed_after))
    torch.manual_seed(99)
    again = fit(Mean(), engine_of(Mean(), 12, lr=0.05), windows(5), windows(2, 50), plan(tmp_path / "cut", resume=True))
    assert again.curve == whole.curve and len(whole.curve) == 12
    assert again.best == whole.best
    assert all(torch.equal(x, again.weights[name]) for name, x in whole.weights.items())


def test_the_curve_falls_and_is_of_the_drawn_windows(tmp_path):
    found = fit(Mean(), engine_of(Mean(), 60), windows(4), windows(1, 9), plan(None, steps=60))
    mean = torch.stack([w.layers[0].k[:, 0, 0].mean() for w in windows(4)]).mean()
    assert abs(float(found.weights["weight"]) - float(mean)) < abs(float(engine_of(Mean(), 1).weights()["weight"]) - float(mean))
    assert len({row["noise"] for row in found.curve}) == 60, "every step draws its own"


def test_every_window_comes_once_before_any_comes_again():
    for seed in range(3):
        orders = [[window_at(seed, 7, epoch * 7 + i) for i in range(7)] for epoch in range(3)]
        assert all(sorted(order) == list(range(7)) for order in orders)
        assert orders[0] != orders[1]


def test_early_stop_keeps_the_best(tmp_path):
    """The held-out optimum lies at .5, and training goes through it and on."""

    class Past(Mean):
        def loss(self, module, window, generator):
            return {"loss": (module(torch.ones(1, 1)) - 5).square().mean()}

    part = Past()
    found = fit(part, engine_of(part, 200, lr=0.1), windows(2), windows(1), plan(None, steps=200, every=1, patience=3))
    assert len(found.curve) < 100
    assert found.best["step"] == len(found.curve) - 1 - 3
    best = max(row["held_out_objective"] for row in found.curve)
    assert found.best["held_out_objective"] == best
    assert -((float(found.weights["weight"]) - 0.5) ** 2) == pytest.approx(best)


def test_a_loss_that_is_not_finite_stops_and_keeps_its_batch(tmp_path):
    part = Mean(spoil_at=6)
    with pytest.raises(TrainingError, match=r"step 6 \(window \d\) not all is finite: .*'loss': nan.*not_finite_step_6.safetensors"):
        fit(part, engine_of(part, 12), windows(5), windows(1), plan(tmp_path))
    saved, own = load_file(tmp_path / "not_finite_step_6.safetensors"), windows(5)[window_at(5, 5, 6)]
    assert torch.equal(saved["ids"], own.ids) and torch.equal(saved["1.k"], own.layers[1].k)


@pytest.mark.parametrize("data, held, said", [(0, 1, "to train on"), (2, 0, "held out")])
def test_no_data_is_refused(data, held, said):
    with pytest.raises(TrainingError, match=f"no window {said}"):
        fit(Mean(), engine_of(Mean(), 4), windows(data), windows(held), plan(None))


def test_questions_that_are_needed_and_not_there_are_refused():
    part = Mean()
    part.wants_questions = True
    with pytest.raises(TrainingError, match="no window has one"):
        fit(part, engine_of(part, 4), windows(2), windows(1), plan(None))


@pytest.mark.parametrize(
    "change, said",
    [({"seed": 6}, "seed = 5, this one has 6"), ({"steps": 13}, "steps = 12"), ({"windows": 4}, "windows = 5")],
)
def test_a_checkpoint_of_another_fit_is_refused(tmp_path, change, said):
    fit(Mean(), engine_of(Mean(), 12), windows(5), windows(1), plan(tmp_path))
    count = change.pop("windows", 5)
    with pytest.raises(TrainingError, match=said):
        fit(Mean(), engine_of(Mean(), 12), windows(count), windows(1), plan(tmp_path, resume=True, **change))


def test_another_number_of_ranks_is_refused(tmp_path):
    fit(Mean(), engine_of(Mean(), 12), windows(5), windows(1), plan(tmp_path))
    engine = engine_of(Mean(), 12)
    engine.world = 2
    with pytest.raises(TrainingError, match=r"ranks \(world size\) = 1, this one has 2"):
        fit(Mean(), engine, windows(5), windows(1), plan(tmp_path, resume=True))


def test_nothing_to_resume_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="no checkpoint of a fit"):
        fit(Mean(), engine_of(Mean(), 12), windows(5), windows(1), plan(tmp_path / "none", resume=True))


def test_two_checkpoints_are_kept(tmp_path):
    fit(Mean(), engine_of(Mean(), 12), windows(5), windows(1), plan(tmp_path))
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_8", "step_12"}
    assert json.loads((tmp_path / "step_12" / "fit.json").read_text())["step"] == 12
    assert dataclasses.asdict(plan(None))["every"] == 4
