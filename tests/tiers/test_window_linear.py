"""Near pages as computed beside far pages that hold coefficients (linear codecs): maps apply to the far pool alone."""

import pytest

from pikv_ds.codecs.maps import Transform
from tests.calibrations import random_calibration
from tests.harness.checks import Answers, Dense
from tests.harness.dense import dense_over, rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.windowed import run_mix, tiered

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
LAYERS = [layer(0, dim=16), layer(1, dim=16, window=70), layer(2, dim=16)]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("calibration") / "random.safetensors"
    random_calibration(LAYERS).save(path)
    return str(path)


def coefficients(calibration: str, layers=LAYERS, *, rank: int = 16, **options) -> Driver:
    return tiered(layers, codec="lora_plus", compression={"rank": rank, "calibration": calibration}, page_size=4, **options)


@pytest.mark.parametrize("num_shards", [1, 3], ids="S{}".format)
def test_all_directions_are_exact(calibration, num_shards):
    driver = coefficients(calibration, num_shards=num_shards)
    driver.tolerance = 1e-5
    run_mix(driver)


def test_far_entries_are_projected_and_near_ones_are_not(calibration):
    driver = coefficients(calibration, LAYERS[:1], rank=8)
    answers = driver.without(Dense).add(Answers())
    driver.prefill([60])
    driver.decode()
    maps: Transform = driver.probe.maps(0)
    far = {p for page in driver.probe.far_pool(0).pages(0) for p in page}
    assert 40 < len(far) < 56
    entries = [
        (maps.k.invert(maps.k.apply(k)), maps.v.invert(maps.v.apply(v))) if p in far else (k, v)
        for p, (k, v) in enumerate(driver.history[0][0])
    ]
    q, out, lse = answers.last
    want_out, want_lse, _ = dense_over(q[0, 0], entries, driver.scale(q))
    assert rel_error(out[0, 0], want_out) < 1e-5 and rel_error(lse[0, 0], want_lse) < 1e-5
    exact, _, _ = dense_over(q[0, 0], driver.history[0][0], driver.scale(q))
    assert rel_error(out[0, 0], exact) > 1e-2


@pytest.mark.parametrize("blocks", [
    {"scheduling": {"method": "h2o", "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 3}},
    {"scheduling": {"method": "quest", "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 3}},
    {"routing": {"method": "page_oracle", "budget_pages": 7, "sink_tokens": 2, "recent_tokens": 7}},
    {"routing": {"method": "bounds", "budget_pages": 9, "sink_tokens": 2, "recent_tokens": 7}},
], ids=["h2o", "quest", "page_oracle", "bounds"])  # fmt: skip
def test_choices_are_those_of_raw_pages(calibration, blocks):
    """With all directions kept: attention of far pages is measured with what the maps leave out of the lse, and keys are the model's."""

    def run(driver):
        driver.without(Dense)
        seen = []
        driver.probe.measure_mass(True)
        driver.prefill([70, 31])
        for mask in (*[ragged([1, 1])] * 5, ragged([9, 20]), *[ragged([1, 1])] * 5):
            driver.forward(mask)
            seen.append(driver.probe.kept(0))
        mass = {}  # what h2o counted, by the first position of a page of row 0
        for pool in driver.probe.pools(0):
            ids = pool.page_ids(0, 0)[: int(pool.counts[0, 0]) // 4] if "mass" in pool.columns else []
            mass |= dict(zip([held[0] for held in pool.pages(0)], pool.column("mass")[ids].tolist(), strict=False)) if ids else {}
        read = driver.probe.read
        entries = None if read is None else [read.entries, read.visible, round(1e3 * read.mass), round(1e3 * read.queries)]
        return seen, entries, mass, driver.forward(ragged([1, 1]))

    raw = tiered(LAYERS[:1], page_size=4, **blocks)
    kept, read, mass, outputs = run(raw)
    also_kept, also_read, also_mass, also_outputs = run(coefficients(calibration, LAYERS[:1], **blocks))
    assert kept == also_kept and also_mass == pytest.approx(mass, rel=1e-3) and bool(mass) == ("h2o" in str(blocks))
    if blocks.get("routing", {}).get("method") != "bounds":  # bounds of coefficients are other boxes than those of keys
        assert read == also_read and rel_error(also_outputs[0][0], outputs[0][0]) < 1e-4
