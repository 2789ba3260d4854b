"""Coefficients of keys before their rotation (rope "pre"): read back turned to their positions, wherever they lie and whoever asks."""

import cmath

import pytest
import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.calibration import Calibration, Moments
from pikv_ds.codecs.rope import default_inv_freq, pair_metric, rotate
from pikv_ds.errors import ConfigError
from tests.calibrations import random_calibration
from tests.harness.checks import Answers, Dense
from tests.harness.dense import dense_over, rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.evicting import evicting
from tests.harness.windowed import run_mix

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
LAYERS = [layer(0, dim=16), layer(1, dim=16, window=7), layer(2, dim=16)]
THETA = 100.0
FULL = {
    "lora": {"fit": "attention"},
    "lora_plus": {"rotate": "hadamard"},
    "chunk_pca": {"block": 8},
    "crop": {},
    "prune": {},
}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("calibration") / "random.safetensors"
    random_calibration(LAYERS, rotations=[default_inv_freq(THETA, 16)] * 3).save(path)
    return str(path)


def block(calibration: str, rank: int = 16, **options) -> dict:
    return {"rank": rank, "calibration": calibration, "rope": "pre"} | options


def turned(x: torch.Tensor, position: int, sign: int = 1) -> torch.Tensor:
    """x [H, D] rotated in f64: channels j and j + D / 2 are the real and the imaginary part of a number that turns."""
    out, half = x.double().clone(), x.shape[-1] // 2
    for head in range(x.shape[0]):
        for j in range(half):
            z = complex(x[head, j], x[head, j + half]) * cmath.exp(1j * sign * position * THETA ** (-j / half))
            out[head, j], out[head, j + half] = z.real, z.imag
    return out


def test_turn_and_its_inverse():
    x, inv_freq = torch.randn(9, 2, 16), default_inv_freq(THETA, 16)
    at = torch.tensor([0, 1, 2, 3, 50, 51, 700, -1, 4])
    found = rotate(x, at, inv_freq)
    for i in range(9):
        assert (found[i] - turned(x[i], max(int(at[i]), 0))).abs().max() < 2e-4  # f32 angles, as models have them
    assert (rotate(found, at, inv_freq, back=True) - x).abs().max() < 1e-6
    assert (found[1:7] - x[1:7]).norm(dim=-1).min() > 0.1


@pytest.mark.parametrize(("stride", "keys_at_a_time"), [(1, 1), (1, 5), (1, 13), (4, 1), (4, 3), (8, 9)])
def test_the_metric_of_pairs(stride, keys_at_a_time):
    """In blocks as over pairs one by one: an error e of key j weighs (q_i . R_j e)^2."""
    q, inv_freq = torch.randn(13, 4, 16, dtype=torch.float64), default_inv_freq(THETA, 16)
    want = torch.zeros(2, 16, 16, dtype=torch.float64)
    for j in range(0, 13, stride):
        for i in range(j, 13):
            for head in range(4):
                x = turned(q[i, head : head + 1], j, -1)[0]
                want[head // 2] += torch.outer(x, x) / 2
    found, pairs = pair_metric(q, inv_freq, 2, stride=stride, at_a_time=keys_at_a_time * 2 * 16 * 16)
    assert pairs == sum(13 - j for j in range(0, 13, stride)) and (found - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize("method", list(FULL))
def test_all_directions_are_exact(calibration, method):
    driver = Driver(LAYERS, page_size=4, num_shards=3, codec=method, compression=block(calibration, **FULL[method]))
    driver.tolerance = 1e-5
    run_mix(driver)


@pytest.mark.parametrize("options", [{}, {"expert_ids": "true", "num_shards": 2}, {"placement": "position", "num_shards": 2}], ids=str)
def test_all_directions_are_exact_wherever_entries_lie(calibration, options):
    driver = Driver(LAYERS, page_size=4, codec="lora_plus", compression=block(calibration), **options)
    driver.tolerance = 1e-5
    run_mix(driver)


@pytest.mark.parametrize(("store", "page_size"), [("none", 4), ("fp8_e4m3", 4), ("int8", 64), ("int4", 64)])
def test_it_attends_to_what_is_decoded(calibration, store, page_size):
    """Lossy, against loops in f64: each stored coefficient vector, turned to its own position."""
    options = block(calibration, 8, store=store)
    driver = Driver(LAYERS[:1], page_size=page_size, codec="lora_plus", compression=options)
    answers = driver.without(Dense).add(Answers())
    driver.prefill([70])
    driver.decode()
    maps, pool = driver.probe.maps(0), driver.probe.near_pool(0)
    _, c_k, c_v = (x if x.dim() == 1 else x.transpose(0, 1).unsqueeze(0) for x in pool.stored(0, 0))
    entries = []
    for p in range(71):
        if store == "none":
            own = torch.einsum("hd,hdr->hr", turned(driver.history[0][0][p][0], p, -1) - maps.k.mean, maps.k.encode.double())
            assert (own - c_k[0, :, p]).abs().max() < 1e-4
        k = turned(torch.einsum("hr,hrd->hd", c_k[0, :, p].double(), maps.k.decode.double()) + maps.k.mean, p)
        entries.append((k, torch.einsum("hr,hrd->hd", c_v[0, :, p].double(), maps.v.decode.double()) + maps.v.mean))
    q, out, lse = answers.last
    want_out, want_lse, _ = dense_over(q[0, 0], entries, driver.scale(q))
    assert rel_error(out[0, 0], want_out) < 1e-5 and rel_error(lse[0, 0], want_lse) < 1e-5
    exact, _, _ = dense_over(q[0, 0], driver.history[0][0], driver.scale(q))
    assert rel_error(out[0, 0], exact) > 1e-2


@pytest.mark.parametrize("page_size", [4, 1])
@pytest.mark.parametrize("method", ["streaming_llm", "random"])
def test_entries_keep_their_positions_when_others_leave(calibration, method, page_size):
    """Attention is that over the kept entries, at the positions they had."""
    scheduling = {"method": method, "budget_tokens": 20, "sink_tokens": 2, "recent_tokens": 5}
    options = {"codec": "lora", "compression": block(calibration), "page_size": page_size, "num_shards": 2}
    driver, kept = evicting([LAYERS[0], LAYERS[2]], None, scheduling, **options)
    driver.tolerance = 1e-5
    driver.prefill([40, 3])
    for mask in (ragged([1, 1]), ragged([1, 1]), ragged([9, 12]), ragged([1, 1])):
        driver.forward(mask)
    assert kept.evicted > 30


def test_keys_alone_and_layers_of_their_own(calibration):
    low = {"method": "lora", **block(calibration)}
    for compression in ({"method": "none", "k": low}, {"method": "none", "layers": {"2": low}}, {"method": "lora", **block(calibration)} | {
        "v": {"method": "none"}, "layers": {"1": {"method": "none"}}}):  # fmt: skip
        driver = Driver(LAYERS, page_size=4, num_shards=2, compression=compression)
        driver.tolerance = 1e-5
        run_mix(driver)


def test_values_and_files_that_can_not_serve_are_refused(calibration, tmp_path):
    low = {"method": "lora", **block(calibration)}
    with pytest.raises(ConfigError, match="only keys are rotated"):
        Driver(LAYERS, compression={"method": "none", "v": low})
    old, other = tmp_path / "old.safetensors", tmp_path / "other.safetensors"
    random_calibration(LAYERS).save(old)
    with pytest.raises(ConfigError, match="holds no keys of layer 0 before their rotation: it is of an earlier version"):
        Driver(LAYERS, codec="crop", compression=block(str(old)))
    random_calibration(LAYERS, rotations=[default_inv_freq(THETA, 32)] * 3).save(other)
    with pytest.raises(ConfigError, match="a rotation of 32 channels in layer 0, the model has keys of 16"):
        Driver(LAYERS, codec="crop", compression=block(str(other)))


def test_less_is_lost_of_keys_that_share_a_direction_before_their_rotation():
    """Keys along one line, turned by their positions: rank 8 holds all of them before the rotation and a part after it."""
    at, inv_freq = torch.arange(300), default_inv_freq(THETA, 32)
    k = rotate(torch.randn(300, 1, 1) * torch.randn(32) + 0.01 * torch.randn(300, 1, 32), at, inv_freq)
    made = Calibration.of([(Moments.of(k), Moments.of(k))])
    made.add_unrotated(0, Moments.of(rotate(k, at, inv_freq, back=True)), inv_freq)
    spec = layer(0, num_kv_heads=1, dim=32)
    lost = [CODECS.get("lora").on(made, rank=8, rope=rope).declared_errors(spec, 64, torch.float32)[0] for rope in ("pre", "post")]
    assert lost[0] < 0.02 and lost[1] > 0.3, lost
