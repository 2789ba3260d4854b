"""Routers that balance, count and spend: formulas in float64 loops over what was stored, and the control for each of them."""

import math
from types import SimpleNamespace

import pytest
import torch

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import scores_of
from pikv_ds.routers.memory import Asked
from pikv_ds.routers.scramble import scramble
from pikv_ds.routers.shard_router import ShardRouter
from tests.contracts.test_routers import recording as routed
from tests.harness.driver import ragged
from tests.routers.test_shard_routers import SHARDS, best, logits, run, shards_of
from tests.routing_blocks import routing


def softmax(values: list[float]) -> list[float]:
    highest = max(values)
    weights = [math.exp(x - highest) for x in values]
    return [w / sum(weights) for w in weights]


def test_sinkhorn_follows_its_own_past(tmp_path):
    v, moved = [0.0] * SHARDS, 0
    for asked, scores, keys in run("sinkhorn", tmp_path, steps=16, window=2)[1]:
        own = logits(asked, keys)
        balanced = [x + y for x, y in zip(own, v, strict=True)]
        assert shards_of(scores) == best(balanced, 1)
        moved += best(balanced, 1) != best(own, 1)
        v = [y - math.log(SHARDS * p) / 2 for y, p in zip(v, softmax(balanced), strict=True)]
        v = [y - sum(v) / SHARDS for y in v]
    assert moved, "the balance changed nothing"


def test_sinkhorn_balances_what_the_gate_prefers():
    """All queries alike: the gate alone would send every one to the same shard."""
    router = ROUTERS.build("sinkhorn", window=2)
    router.potential.columns[0] = SimpleNamespace(value=torch.zeros(1, SHARDS))
    router.mean_logits = lambda q, asked: torch.tensor([[3.0, 0.0, 0.5, -torch.inf]])
    asked = SimpleNamespace(layer=0, q=None, positions=torch.tensor([5]), rows=slice(0, 1), row_of_query=lambda: torch.tensor([0]))
    asked.asked = Asked(0, asked.rows, asked.positions)
    share = torch.stack([router.logits(asked).softmax(-1)[0] for _ in range(60)])[-1]
    assert torch.allclose(share, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]), atol=0.02), share


@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_predictive_entropy_reads_as_many_as_it_is_unsure_between(temperature, tmp_path):
    counts = set()
    for asked, scores, keys in run("predictive_entropy", tmp_path, top_k=3, temperature=temperature)[1]:
        own = logits(asked, keys)
        entropy = -sum(p * math.log(p) for p in softmax([x / temperature for x in own]))
        assert abs(math.exp(entropy) % 1 - 0.5) > 1e-4, "a rounding the oracle can't be sure of"
        wanted = best(own, max(1, min(3, round(math.exp(entropy)))))
        assert shards_of(scores) == wanted
        counts.add(len(wanted))
    assert counts == {3} if temperature == 3.0 else len(counts) > 1


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_budget_aware_spends_its_share(share, tmp_path):
    allowance, read = share, []
    seen = run("budget_aware", tmp_path, steps=40, share=share, window=4)[1]
    for asked, scores, keys in seen:
        own, sizes = logits(asked, keys), [len(keys[shard::SHARDS]) / len(keys) for shard in range(SHARDS)]
        wanted, spent = set(), 0.0
        for shard in sorted(range(SHARDS), key=lambda s: (-own[s], s)):
            spent += sizes[shard]
            if wanted and spent > allowance + 1e-6:
                break
            wanted.add(shard)
        assert shards_of(scores) == wanted
        read.append(sum(sizes[shard] for shard in wanted))
        allowance = min(1.0, max(0.0, allowance + (share - read[-1]) / 4))
    assert sum(read[8:]) / len(read[8:]) == pytest.approx(share, abs=0.03)


SHARD_ROUTERS = [name for name, router in ROUTERS.items() if issubclass(router, ShardRouter)]


@pytest.mark.parametrize("base", SHARD_ROUTERS)
def test_shuffle_reads_what_its_base_chose_for_another_query(base, tmp_path):
    """Every choice of the base is known; what is read is one of those of the latest 128 queries, the one that the hash names."""
    block = routing(base, tmp_path, layers=2, shards=SHARDS, query_width=4 * 8)
    options = {key: value for key, value in block.items() if key not in ("method", "sink_tokens", "recent_tokens")}
    driver = routed("shuffle_shards", tmp_path, num_shards=SHARDS, base=base, base_options=options)
    router = driver.probe.router
    choose, shuffled, chosen, read = router.base.chosen_shards, router.chosen_shards, {}, []

    def choosing(asked):
        own = choose(asked)
        if asked.layer == 0:
            earlier = dict(chosen)
            for position, shards in zip(asked.positions.tolist(), own, strict=True):
                chosen[position] = shards
            read.append((asked, own, earlier))
        return own

    def scoring(asked):
        swapped = shuffled(asked)
        scores = scores_of(swapped, asked)
        if asked.layer == 0:
            asked, own, earlier = read[-1]
            for i, position in enumerate(asked.positions.tolist()):
                slot = int(scramble(asked.positions[i], 0)) % 128
                known = [p for p in earlier if p % 128 == slot]
                found = shards_of(scores.view(-1, SHARDS, scores.shape[-1])[i])
                if known:
                    wanted = earlier[max(known)]
                else:
                    wanted = own[i].roll(1 + int(scramble(asked.positions[i], 1)) % (SHARDS - 1))
                assert found == set(wanted.nonzero().flatten().tolist()), position
                counted[bool(known)] += 1
        return swapped

    counted = {True: 0, False: 0}
    router.base.chosen_shards, router.chosen_shards = choosing, scoring
    driver.prefill([150])
    driver.forward(ragged([60]))
    for _ in range(10):
        driver.decode()
    assert min(counted.values()) > 2, counted


def test_shuffle_refuses_what_has_no_shards_to_swap():
    for options, said in [
        ({"base": "bounds"}, "for routers of pages the control is 'shuffle'"),
        ({"base": "shuffle_shards"}, "base = one of"),
        ({"base": "topk", "base_options": {"alpha": 1.0}}, "base_options = options of the router 'topk'"),
        ({"base": "learned"}, "for routers of pages the control is 'shuffle'"),
        ({"base": "topk", "base_options": {"top_k": 0}}, "top_k of at least 1"),
    ]:
        with pytest.raises(ConfigError, match=said):
            PiKVConfig(page_size=4, routing={"method": "shuffle_shards", **options})


def test_cache_aware_leaves_a_shard_that_disappoints(tmp_path):
    """Over many steps: misses are counted in every forward and decay, and the penalty is that of the counter the step began with."""
    driver = routed("cache_aware", tmp_path, num_shards=SHARDS)
    driver.prefill([37])
    router = driver.probe.router
    answered, penalised, moved = router.answered, [], 0

    def answering(asked, page_list, page_lse):
        before = router.misses.columns[asked.layer].value[0].clone()
        answered(asked, page_list, page_lse)
        if asked.layer == 0:
            keys = torch.stack([k for k, _ in driver.history[0][0]]).double()
            tables = asked.block_table.view(SHARDS, -1)
            q, missed = asked.q[0].double(), [0.0] * SHARDS
            for g in range(4):
                mass, read = [0.0] * SHARDS, [0] * SHARDS
                for shard in range(SHARDS):
                    for column in page_list[shard, 0][page_list[shard, 0] >= 0].tolist():
                        assert int(tables[shard, column]) >= 0
                        for p in range(shard + SHARDS * 4 * column, len(keys), SHARDS)[:4]:
                            mass[shard] += math.exp(asked.scale * float(q[g] @ keys[p, g // 2]))
                            read[shard] += 1
                for shard in range(SHARDS):
                    missed[shard] += read[shard] > 0 and mass[shard] / sum(mass) < read[shard] / sum(read)
            wanted = [float(b) * (1 - 1 / 16) + m / 4 for b, m in zip(before, missed, strict=True)]
            assert router.misses.columns[0].value[0].tolist() == pytest.approx(wanted, abs=1e-5)
            penalised.append((asked, before, keys))

    router.answered = answering
    for _ in range(20):
        driver.decode()
    for asked, before, keys in penalised:
        own = logits(asked, keys)
        with_penalty = best([x - 0.5 * math.log1p(float(m)) for x, m in zip(own, before, strict=True)], 1)
        moved += with_penalty != best(own, 1)
    assert len(penalised) == 20 and moved, "no query ever went elsewhere"
