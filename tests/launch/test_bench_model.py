"""The latency model's fit on times that are made by it, and the command on short contexts."""

import json

import pytest

from pikv_ds.launch.bench.latency_model import Point, fit, predict
from pikv_ds.launch.cli import main

BETA, GAMMA = 20e9, 5e9  # bytes/s
BYTES = {"bfloat16": 4096, "int8": 2144, "int4": 1120}  # per token and layer, 8 heads of 128


def points(seconds_of, contexts=(2048, 8192, 32768), batches=(1, 2)) -> list[Point]:
    made = []
    for name, per_token in BYTES.items():
        for context in contexts:
            for batch in batches:
                stored = per_token * context * batch
                made.append(Point(name, name != "bfloat16", batch, stored, seconds_of(name, stored, batch)))
    return made


def test_times_of_the_papers_model_give_back_beta_and_gamma():
    """T = (d k B / rho)(2 / beta + eta / gamma) with eta = 2, written with d, k, B and rho as the paper has it."""

    def seconds(name, stored, batch):
        dkb = 1024 * 2 * (stored / BYTES[name])  # 2 bytes per element; 8 heads x 128 for each of K and V
        rho = 2 * dkb / stored
        return dkb / rho * (2 / BETA + (2 if name != "bfloat16" else 0) / GAMMA)

    model = fit(points(seconds))["paper"]
    assert model["beta_gbps"] == pytest.approx(20) and model["gamma_gbps"] == pytest.approx(5)
    assert model["max_abs_error"] < 1e-9 and model["eta"] == {"int8": 2.0, "int4": 2.0}


def test_the_extended_model_finds_eta_by_format_and_what_lies_outside_the_form():
    own = {"bfloat16": 0.0, "int8": 0.5, "int4": 2.0}
    seconds = lambda name, stored, batch: 2e-4 + 3e-5 * batch + stored * (1 / BETA + own[name] / 2 / GAMMA)  # noqa: E731
    made = points(seconds)
    both = fit(made)
    model = both["extended"]
    assert model["beta_gbps"] == pytest.approx(20) and model["gamma_gbps"] == pytest.approx(5)
    assert model["eta"] == {"int8": pytest.approx(0.5), "int4": pytest.approx(2.0)} and max(model["eta"].values()) <= 2
    assert model["seconds_per_step"] == pytest.approx(2e-4) and model["seconds_per_request"] == pytest.approx(3e-5)
    assert model["max_abs_error"] < 1e-6 < both["paper"]["max_abs_error"], "the paper's form has no constant"
    for point, error in zip(made, model["relative_errors"], strict=True):
        assert predict(model, point) == pytest.approx(point.seconds * (1 + error), rel=1e-9)


def test_no_rate_is_negative():
    """Codes that are read faster than raw bytes of the same number: gamma is not needed, and is not made negative."""
    faster = lambda name, stored, batch: stored / BETA * (1 if name == "bfloat16" else 0.8)  # noqa: E731
    for model in fit(points(faster)).values():
        assert model["gamma_gbps"] is None and model["beta_gbps"] > 0
        assert 0.05 < model["max_abs_error"] < 0.3 and model["seconds_per_step"] >= 0


def test_the_fit_is_the_least_of_relative_errors():
    """Against scipy-free brute force: moving either coefficient makes the sum of squares larger."""
    noisy = lambda name, stored, batch: stored * (1 / BETA + (name != "bfloat16") / GAMMA) * (1 + 0.2 * ((stored >> 11) % 3 - 1))  # noqa: E731
    made = points(noisy)
    model = fit(made)["paper"]
    square = lambda m: sum((predict(m, p) / p.seconds - 1) ** 2 for p in made)  # noqa: E731
    for key in ("beta_gbps", "gamma_gbps"):
        for factor in (0.97, 1.03):
            assert square(model | {key: model[key] * factor}) > square(model)


def test_points_that_cannot_tell_the_terms_apart_are_refused():
    with pytest.raises(ValueError, match="1 sizes of raw entries and 2 formats that are decoded: at least 2 and 1"):
        fit(points(lambda name, stored, batch: stored / BETA, contexts=(2048,), batches=(1,)))


def test_the_command_measures_fits_and_draws(tmp_path):
    out, plot = tmp_path / "model.json", tmp_path / "model.png"
    assert main(["bench", "model", "--quick", "--formats", "bfloat16", "int8", "--json", str(out), "--plot", str(plot)]) == 0
    document = json.loads(out.read_text())
    rows = document["rows"]
    assert len(rows) == 2 * 2 * 2 and {row["attention_impl"] for row in rows} == {"pikv cpu bf16", "pikv cpu int8"}
    assert {row["stored_bytes"] for row in rows if row["format"] == "bfloat16"} == {4096 * 256 * n for n in (1, 2, 4, 8)}
    assert all(row["step_ms"] > 0 and row["paper_ms"] >= 0 for row in rows) and plot.read_bytes().startswith(b"\x89PNG")
    assert [line["model"] for line in document["fit"]] == ["paper", "extended"] and document["fit"][0]["seconds_per_step"] == 0
