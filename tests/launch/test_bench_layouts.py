"""`pikv bench layouts`: KIVI's layout against its definition written with loops, bytes by hand, and the page formats beside it."""

import json

import pytest
import torch

from pikv_ds.errors import ConfigError
from pikv_ds.launch.bench.layouts import GROUP, RESIDUAL, attention, kivi, ours
from pikv_ds.launch.cli import build_parser, main


def heads(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, 2, 64, generator=draw).bfloat16() for _ in range(2))


def group_error(x: torch.Tensor, stored: torch.Tensor, bits: int) -> bool:
    """Every element of a group is within half a step of its own, plus what fp16 rounds off scale and zero."""
    step = float(x.max() - x.min()) / (2**bits - 1)
    return float((x - stored).abs().max()) <= step / 2 + 2**-10 * float(x.abs().max()) * 2


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("residual", [0, RESIDUAL])
def test_kivi_groups_keys_by_channel_and_values_by_token(bits, residual):
    tokens = 300
    k, v = heads(tokens)
    stored = kivi(k, v, bits, residual)
    closed_k, closed_v = tokens - tokens % (residual or GROUP), tokens - residual
    assert torch.equal(stored.k[closed_k:], k[closed_k:].float()) and torch.equal(stored.v[closed_v:], v[closed_v:].float())
    assert not torch.equal(stored.k[:closed_k], k[:closed_k].float())
    for head in range(2):
        for channel in (0, 17, 63):
            for start in range(0, closed_k, GROUP):
                at = (slice(start, start + GROUP), head, channel)
                assert group_error(k[at].float(), stored.k[at], bits)
                assert stored.k[at].unique().numel() <= 2**bits
        for token in range(0, closed_v, 37):
            for at in ((token, head, slice(0, 32)), (token, head, slice(32, 64))):
                assert group_error(v[at].float(), stored.v[at], bits)
    width, groups_k, groups_v = 2 * 64, closed_k // GROUP * 2 * 64, closed_v * 2 * 2
    raw = 2 * width * (tokens - closed_k + tokens - closed_v)
    assert stored.nbytes == (closed_k + closed_v) * width * bits // 8 + 4 * (groups_k + groups_v) + raw


@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3"])
def test_ours_are_the_pages_of_the_cache(name):
    k, v = heads(200)
    stored = ours(k, v, name)
    errors = [float((a - b.float()).norm() / b.float().norm()) for a, b in ((stored.k, k), (stored.v, v))]
    assert stored.k.shape == k.shape and all(0 < error < 0.15 for error in errors)
    if name != "fp8_e4m3":
        assert torch.equal(stored.k[192:], k[192:].float()), "the open group of keys is raw"


def test_attention_is_causal():
    k, v = (x.double() for x in heads(40))
    q = torch.randn(3, 4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = attention(q, k, v)
    for query in range(3):
        for head in range(4):
            keys = slice(0, 40 - 2 + query)
            weights = torch.softmax(k[keys, head // 2] @ q[query, head] / 8, 0)
            assert torch.allclose(out[query, head], weights @ v[keys, head // 2])


def test_the_table(tmp_path):
    file = tmp_path / "rows.json"
    assert main(["bench", "layouts", "--context", "256", "--json", str(file)]) == 0
    rows = {row["layout"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"KIVI int4, residual 128", "KIVI int2, residual 0", "ours int4", "ours int8"} <= set(rows)
    for bits, twice in (("KIVI int4, residual 0", "KIVI int2, residual 0"), ("ours int8", "ours int4")):
        assert all(rows[bits][error] < rows[twice][error] for error in ("k_error", "v_error", "out_error"))
        assert rows[bits]["bytes_per_token"] > rows[twice]["bytes_per_token"]


def test_a_context_too_long_is_refused():
    args = build_parser().parse_args(["bench", "layouts", "--context", "5000"])
    with pytest.raises(ConfigError, match="--context 5000: legal for this model and text is 128 to 4096"):
        args.run(args)
