"""The routers' formulas, written out again in float64 from what was stored: which shards a decoding query reads, and page scores."""

import math

import pytest
import torch

from pikv_ds.routers.base import scores_of
from tests.contracts.test_routers import recording as routed

SHARDS, HEADS, GROUP = 4, 2, 2


def run(name: str, folder, steps: int = 12, **options):
    """Per decode step of one request in layer 0: (asked, chosen shards [S] or None, scores, keys stored [n, H, D])."""
    driver = routed(name, folder, num_shards=SHARDS)
    driver.prefill([37])
    router, seen = driver.probe.router, []
    for option, value in options.items():
        assert hasattr(router, option)
        setattr(router, option, value)
    hook = "score" if router.budgeted else "chosen_shards"
    choose = getattr(router, hook)

    def recording(asked):
        chosen = choose(asked)
        if asked.layer == 0:
            scores = chosen.clone() if router.budgeted else scores_of(chosen, asked)
            seen.append((asked, scores, torch.stack([k for k, _ in driver.history[0][0]]).double()))
        return chosen

    setattr(router, hook, recording)
    for _ in range(steps):
        driver.decode()
    assert len(seen) == steps
    return router, seen


def shards_of(scores: torch.Tensor) -> set[int]:
    return {shard for shard in range(SHARDS) if bool((scores[shard] > -torch.inf).any())}


def logits(asked, keys) -> list[float]:
    """scale q mu_s, mean over query heads; entry p lies in shard p mod 4."""
    q = asked.q[0].double()
    return [
        sum(asked.scale * float(q[g] @ keys[shard::SHARDS, g // GROUP].mean(0)) for g in range(HEADS * GROUP)) / (HEADS * GROUP)
        for shard in range(SHARDS)
    ]


def best(values: list[float], count: int) -> set[int]:
    return set(sorted(range(SHARDS), key=lambda shard: (-values[shard], shard))[:count])


@pytest.mark.parametrize("top_k", [1, 3])
def test_topk(tmp_path, top_k):
    chosen = set()
    for asked, scores, keys in run("topk", tmp_path, top_k=top_k)[1]:
        assert shards_of(scores) == best(logits(asked, keys), top_k)
        chosen |= shards_of(scores)
    assert len(chosen) > 1


def test_load_balanced(tmp_path):
    load, chosen = [0.0] * SHARDS, []
    for asked, scores, keys in run("load_balanced", tmp_path, alpha=4.0, window=4)[1]:
        wanted = best([x - 4.0 * (load[s] - sum(load) / SHARDS) for s, x in enumerate(logits(asked, keys))], 1)
        assert shards_of(scores) == wanted
        load = [0.75 * x + 0.25 * (s in wanted) for s, x in enumerate(load)]
        chosen.append(wanted)
    assert all(chosen[i] != chosen[i + 1] or chosen[i] != chosen[i + 2] for i in range(len(chosen) - 2)), "the penalty moves queries on"


def test_entropy(tmp_path):
    moved = 0
    for asked, scores, keys in run("entropy", tmp_path, beta=20.0)[1]:
        own = logits(asked, keys)
        total = sum(map(math.exp, own))
        p = [math.exp(x) / total for x in own]
        penalised = [x - 20.0 * (-a * math.log(a) - (1 - a) * math.log(1 - a)) for x, a in zip(own, p, strict=True)]
        assert shards_of(scores) == best(penalised, 1)
        moved += best(penalised, 1) != best(own, 1)
    assert moved, "the penalty changed nothing"


def test_two_stage(tmp_path):
    for asked, scores, keys in run("two_stage", tmp_path)[1]:
        own, sizes = logits(asked, keys), [len(keys[shard::SHARDS]) for shard in range(SHARDS)]
        group = max((0, 1), key=lambda g: sum(own[s] * sizes[s] for s in (2 * g, 2 * g + 1)) / (sizes[2 * g] + sizes[2 * g + 1]))
        assert shards_of(scores) == {max((2 * group, 2 * group + 1), key=own.__getitem__)}


def test_hash_reads_neighbours_and_every_shard_in_turn(tmp_path):
    chosen = [shards_of(scores) for _, scores, _ in run("hash", tmp_path, steps=40, top_k=2)[1]]
    assert {tuple(sorted(pair)) for pair in chosen} == {(0, 1), (1, 2), (2, 3), (0, 3)}


def test_experts_read_the_shard_of_the_own_entry(tmp_path):
    for asked, scores, _ in run("experts", tmp_path)[1]:
        assert shards_of(scores) == {int(asked.homes[0, int(asked.positions[0])])}


def test_cache_aware_counts_reads_in_vain(tmp_path):
    """A shard misses in the heads in which its entries hold less of the attention than their share of what was read."""
    router, seen = run("cache_aware", tmp_path, steps=1, top_k=2)
    asked, scores, keys = seen[0]
    assert shards_of(scores) == best(logits(asked, keys), 2)
    pinned = {
        (shard, column) for shard, column in (asked.pinned & asked.visible)[0].nonzero().tolist()
    }  # read in all shards, also where the router did not choose
    missed = [0.0] * SHARDS
    for g in range(HEADS * GROUP):
        mass, read = [0.0] * SHARDS, [0] * SHARDS
        for shard in range(SHARDS):
            for index, key in enumerate(keys[shard::SHARDS]):
                if shard in shards_of(scores) or (shard, index // 4) in pinned:
                    mass[shard] += math.exp(asked.scale * float(asked.q[0, g].double() @ key[g // GROUP]))
                    read[shard] += 1
        for shard in range(SHARDS):
            missed[shard] += read[shard] > 0 and mass[shard] / sum(mass) < read[shard] / sum(read)
    assert router.misses.columns[0].value[0].tolist() == pytest.approx([n / (HEADS * GROUP) for n in missed])
    assert 0 < sum(missed) < SHARDS * HEADS * GROUP


def test_page_oracle_scores_are_the_mass(tmp_path):
    for asked, scores, keys in run("page_oracle", tmp_path)[1]:
        q = asked.scale * asked.q[0].double().view(HEADS, GROUP, -1)
        for head in range(HEADS):
            mass = (q[head] @ keys[:, head].T).softmax(-1).sum(0)
            for shard in range(SHARDS):
                pages = mass[shard::SHARDS].split(4)
                assert scores[shard, head, : len(pages)].tolist() == pytest.approx([float(page.sum()) for page in pages], rel=1e-4)


def test_centroid_scores_are_the_attention_to_centroids(tmp_path):
    """Means of what each cluster took in, counts of every page, and the softmax over clusters."""
    router, seen = run("centroids", tmp_path, steps=6)
    asked, scores, keys = seen[-1]
    mean, weight = router.mean[0].value[0].double(), router.weight[0].value[0].double()
    assert weight.sum(-1).tolist() == [len(keys)] * HEADS
    assert torch.allclose((mean * weight.unsqueeze(-1)).sum(1), keys.sum(0), atol=1e-4)
    counts = asked.pool.summaries["clusters"]
    for head in range(HEADS):
        q = asked.scale * asked.q[0].double().view(HEADS, GROUP, -1)[head]
        weights = torch.exp(q @ mean[head].T) * (weight[head] > 0)
        each = (weights / (weights * weight[head]).sum(-1, keepdim=True)).sum(0)
        for shard in range(SHARDS):
            held = len(keys[shard::SHARDS])
            for column in range(-(-held // 4)):
                page = counts[asked.block_table[shard, 0, column], head].double()
                assert page.sum() == min(4, held - 4 * column)
                assert float(scores[shard, head, column]) == pytest.approx(float(page @ each), rel=1e-4)
