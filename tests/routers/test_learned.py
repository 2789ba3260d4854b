"""The router `learned`: it scores what its module scores, keeps what it says, and refuses files of others."""

import math

import pytest
import torch

from pikv_ds.codecs.part_file import PartFile
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.routers.kv_gate import GateLayer, pack, unpack
from tests.harness.checks import Finite
from tests.harness.driver import Driver, layer, ragged
from tests.routing_blocks import routing
from tests.trained_gates import random_gate

LAYERS = [layer(0), layer(1)]
PAGE = 4


def driver_of(folder, **more) -> Driver:
    block = routing("learned", folder, layers=2, shards=more.get("num_shards", 1), query_width=32)
    return Driver(LAYERS, routing=block, page_size=PAGE, checks=[Finite()], placement="position", **more)


def scores(driver: Driver) -> list:
    """(asked, lens, score) of every call from now on; lens: the tables' own tensor goes on with the request."""
    found, score = [], driver.probe.router.score

    def scoring(asked):
        found.append((asked, asked.seqlens.clone(), score(asked)))
        return found[-1][-1]

    driver.probe.router.score = scoring
    return found


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("forwards", [[[1, 1]], [[5, 2], [1, 1]], [[9, 9], [1, 1], [3, 1]]], ids=["decode", "chunk", "chunks"])
def test_scores_are_those_of_the_trained_module(num_shards, forwards, tmp_path):
    """Of every full page, from the keys that the driver knows it holds; open pages have the sum over the keys that they have."""
    driver = driver_of(tmp_path, num_shards=num_shards)
    module = random_gate(tmp_path / "again.safetensors", LAYERS)
    driver.prefill([40, 23])
    seen = scores(driver)
    for new in forwards:
        driver.forward(ragged(new))
    checked = 0
    for asked, lens, score in seen:
        queries, shards, columns = asked.visible.shape
        score = score.view(queries, shards, 2, columns)
        rows, lens = asked.row_of_query().tolist(), lens.view(queries, shards)
        for i in range(queries):
            if int(asked.positions[i]) < 0:
                continue
            for shard in range(shards):
                held = driver.history[asked.layer][rows[i]]
                keys = torch.stack([key for p, key in enumerate(_keys(held)) if p % num_shards == shard])[: int(lens[i, shard])]
                q = asked.scale * asked.q[i].float().unflatten(0, (2, 2)).unsqueeze(0)
                for column, page in enumerate(keys.split(PAGE)):
                    if len(page) == PAGE:
                        own = module(asked.layer, q, page, PAGE)[0, :, 0]
                    else:
                        own = module.layers[asked.layer](q, page)[0].logsumexp((1, 2))
                    torch.testing.assert_close(score[i, shard, :, column], own, atol=1e-5, rtol=1e-5)
                    checked += 1
    assert checked > 20


def _keys(held) -> list:
    return [entry[0].float() for entry in held]


def test_codes_are_the_nearest_levels_and_pack_exactly():
    for bits, rank in ((2, 8), (4, 4)):
        gate = GateLayer(2, 2, 8, rank, bits, 3).requires_grad_(False)
        keys = 2**bits * torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(1))
        codes = gate.codes(keys)
        z = torch.einsum("nhd,hdr->nhr", keys - gate.center, gate.encode) / gate.log_step.exp()
        levels = torch.arange(2**bits) + 0.5 - 2 ** (bits - 1)
        nearest = (z.unsqueeze(-1) - levels).abs().argmin(-1)
        assert torch.equal(codes, nearest.float()) and codes.unique().tolist() == list(range(2**bits))
        packed = pack(codes, bits)
        assert packed.shape == (50, 2, rank * bits // 8) and torch.equal(unpack(packed, bits), codes)


def test_a_logit_of_exact_codes_is_the_product(tmp_path):
    """Keys that lie on levels lose nothing: with full rank and inverse maps the gate gives q k, up to a number per query."""
    gate = GateLayer(1, 2, 4, 4, 2, 1).double().requires_grad_(False)
    draw = torch.Generator().manual_seed(2)
    gate.encode.copy_(torch.randn(1, 4, 4, generator=draw, dtype=torch.float64))
    gate.query.copy_(torch.linalg.inv(gate.encode).mT[:, None].expand_as(gate.query))
    gate.log_step.copy_(0.1 * torch.randn(1, 4, generator=draw, dtype=torch.float64))
    levels = torch.randint(-2, 2, (9, 1, 4), generator=draw) + 0.5
    keys = torch.einsum("nhr,hrd->nhd", levels * gate.log_step.exp(), torch.linalg.inv(gate.encode)) + gate.center
    q = torch.randn(3, 1, 2, 4, generator=draw, dtype=torch.float64)
    off = gate(q, keys) - torch.einsum("qhgd,thd->qhgt", q, keys)
    torch.testing.assert_close(off, off[..., :1].expand_as(off), atol=1e-9, rtol=0)


def test_gradients_in_fp64():
    """Of everything but the codes' own rounding, which passes gradients as if it were not there: of the product, the totals, the sums."""
    gate = GateLayer(2, 2, 4, 4, 2, 2).double()
    draw = torch.Generator().manual_seed(3)
    q, keys = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, 2, 2, 4), (8, 2, 4)))
    codes = gate.codes(keys).detach()

    def of(q, query, log_step, total, bias):
        given = {"query": query, "log_step": log_step, "total": total, "total_bias": bias}
        met, added = torch.func.functional_call(_Queries(gate), {f"gate.{name}": x for name, x in given.items()}, (q,))
        logits = torch.einsum("qhgr,thr->qhgt", met, codes) + added.unsqueeze(-1)
        return logits.unflatten(-1, (-1, 4)).logsumexp((2, 4))

    inputs = [q, gate.query, gate.log_step, gate.total, gate.total_bias]
    assert torch.autograd.gradcheck(of, [x.detach().clone().requires_grad_() for x in inputs])
    inside = (keys - gate.center) * 0.3 + gate.center  # no code at the end of its range: the straight-through gradient is that of z
    (gate.codes(inside).sum() * 1.0).backward()
    want = torch.einsum("nhd,hr->hdr", inside - gate.center, torch.exp(-gate.log_step))
    torch.testing.assert_close(gate.encode.grad, want)


class _Queries(torch.nn.Module):
    def __init__(self, gate: GateLayer) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, q):
        met, added = self.gate.queries(q)
        return met, added - self.gate.totals(q)


def test_tensor_parallel_ranks_run_their_heads(tmp_path):
    gate = random_gate(tmp_path / "a.safetensors", LAYERS).layers[1].requires_grad_(False)
    q, keys = torch.randn(3, 2, 2, 8), torch.randn(8, 2, 8)
    own = gate.of_heads(1, 1)
    torch.testing.assert_close(own(q[:, 1:], keys[:, 1:]), gate(q, keys)[:, 1:])
    assert gate.of_heads(0, 2) is gate


def test_first_weights_lose_least(tmp_path):
    """Without rounding, the maps of rank r are the best of that rank: what is lost of q k is what the smaller singular values say."""
    draw = torch.Generator().manual_seed(5)
    mix_k, mix_q = torch.randn(8, 8, generator=draw), torch.randn(8, 8, generator=draw)
    keys, q = torch.randn(4000, 1, 8, generator=draw) @ mix_k + 1, torch.randn(2000, 1, 2, 8, generator=draw) @ mix_q
    lost = []
    for rank in (4, 8):
        gate = GateLayer(1, 2, 8, rank, 4, 1).requires_grad_(False)
        gate.begin(keys, q)
        product = torch.einsum(
            "qgr,tr->qgt", torch.einsum("qgd,dr->qgr", q[:, 0], gate.query[0, 0]), (keys[:, 0] - gate.center[0]) @ gate.encode[0]
        )
        want = torch.einsum("qgd,td->qgt", q[:, 0], keys[:, 0] - gate.center[0])
        lost.append(float((product - want).square().mean() / want.square().mean()))
    s = torch.linalg.svdvals(_root(q.flatten(0, 2)).mT @ _root(keys[:, 0] - keys[:, 0].mean(0)))
    assert lost[1] < 1e-6 and lost[0] == pytest.approx(float(s[4:].square().sum() / s.square().sum()), rel=0.02)


def _root(x):
    return torch.linalg.cholesky(x.mT @ x / len(x))


def test_bytes_of_pages_of_16_are_those_of_bounds(tmp_path):
    found = {}
    for name in ("learned", "bounds"):
        block = routing(name, tmp_path, layers=2, shards=1, query_width=32)
        driver = Driver(LAYERS, routing=block, page_size=16, checks=[Finite()], placement="position")
        driver.prefill([70])
        pool = driver.probe.all_pools[0]
        found[name] = {column: pool.column(column).nbytes / pool.num_pages for column in pool.columns}
    assert found["learned"] == {"codes": 2 * 16 * 8 * 2 / 8} and sum(found["bounds"].values()) == found["learned"]["codes"]


def test_files_of_others_are_refused(tmp_path):
    random_gate(tmp_path / "gate.safetensors", LAYERS)
    whole = PartFile.load(tmp_path / "gate.safetensors", "kv_gate")
    PartFile(**{**_fields(whole), "weights": {"layers.0.center": torch.zeros(2, 8)}}).save(tmp_path / "torn.safetensors")
    PartFile(**{**_fields(whole), "part": "scores"}).save(tmp_path / "scores.safetensors")
    for name, said in (("torn", "a whole file of `pikv train kv_gate`"), ("scores", "holds the part 'scores'"), ("none", "readable")):
        with pytest.raises(ConfigError, match=said):
            PiKVConfig(page_size=4, routing={"method": "learned", "path": str(tmp_path / f"{name}.safetensors"), "budget_pages": 4})
    with pytest.raises(ConfigError, match="was trained for 2 KV heads of width 8 and 8 in layer 0, this model has 2 of 16 and 16"):
        Driver([layer(0, dim=16)], page_size=4, routing={"method": "learned", "path": whole.source, "budget_pages": 32})
    assert math.isfinite(sum(x.sum() for x in whole.weights.values()))


def _fields(file: PartFile) -> dict:
    return {name: getattr(file, name) for name in ("part", "layers", "options", "weights", "fingerprint", "about")}
