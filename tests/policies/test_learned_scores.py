"""learned_scores: its formula in plain loops, parity with the module that is trained, and files that are not of this model."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pikv_ds import attach, bundled
from pikv_ds.bundled.recall import Prose, recall_prompt
from pikv_ds.codecs.part_file import PartFile
from pikv_ds.errors import ConfigError
from pikv_ds.policies.entry_scorer import EntryScorer, page_scores
from pikv_ds.policies.learned_scores import LearnedScores
from tests.harness.driver import Driver, layer
from tests.harness.evicting import Kept, Page, evicting
from tests.retention.test_evict import SMALL
from tests.retention_blocks import mlp_weights, needed, scorer_file

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def direction(x: torch.Tensor) -> list[float]:
    rms = math.sqrt(sum(float(y) ** 2 for y in x) / len(x))
    return [float(y) / rms for y in x] + [math.log(rms)]


def network(weights: dict[str, torch.Tensor]):
    def score(page: Page, kept: Kept, i: int, row: int) -> float:
        w1, b1, w2, b2 = (weights[f"layers.{i}.{name}"].double() for name in ("w1", "b1", "w2", "b2"))
        total = 0.0
        for p in page.positions:
            k, v = kept.driver.history[i][row][p]
            for h in range(2):
                x = torch.tensor(direction(k[h]) + direction(v[h]), dtype=torch.float64)
                hidden = [max(0.0, float(w1[h, n] @ x + b1[h, n])) for n in range(w1.shape[1])]
                total += math.exp(sum(float(w) * y for w, y in zip(w2[h], hidden, strict=True)) + float(b2[h]))
        return total / 2

    return score


@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
def test_the_formula(num_shards, tmp_path):
    own = needed("learned_scores", tmp_path, layers=2, heads=2, width=16)
    scheduling = {"method": "learned_scores", "budget_tokens": 24, **SMALL, **own}
    weights = PartFile.load(own["path"], "eviction_scorer").weights
    driver, kept = evicting([layer(0), layer(1)], network(weights), scheduling, page_size=3, num_shards=num_shards)
    driver.prefill([40, 25])
    for _ in range(6):
        driver.decode()
    assert kept.evicted > 60


@pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
def test_of_heads(head_budget, tmp_path):
    """With a page per head each row is scored by its own head's network; their mean is the shared score."""
    base = {"method": "learned_scores", "budget_tokens": 200, **SMALL, **needed("learned_scores", tmp_path, layers=1, heads=2, width=16)}
    shared, apart = (Driver([layer(0)], page_size=4, scheduling=base | {"head_budget": which}) for which in ("shared", head_budget))
    for driver in (shared, apart):
        driver.prefill([33, 21])
    both, each = (d.probe.scores(0).flatten(1)[:, :9] for d in (shared, apart))
    assert torch.allclose(both[0], (each[0] + each[1]) / 2, rtol=1e-4)
    assert torch.allclose(both[1, :6], (each[2] + each[3])[:6] / 2, rtol=1e-4)
    assert not torch.allclose(each[0], each[1], rtol=0.1)


def test_the_policy_says_what_the_module_says(tmp_path):
    """Parity: the module over keys and values as they were given, the policy over pages of a cache that holds them."""
    own = needed("learned_scores", tmp_path, layers=2, heads=2, width=16)
    driver = Driver([layer(0), layer(1)], page_size=4, scheduling={"method": "learned_scores", "budget_tokens": 200, **SMALL, **own})
    driver.prefill([32])
    module = EntryScorer(driver.probe.policy.trained.layers, 6)
    module.load_state_dict(dict(driver.probe.policy.trained.weights))
    for i in range(2):
        k, v = (torch.stack([driver.history[i][0][p][side] for p in range(32)]).transpose(0, 1) for side in (0, 1))
        want = page_scores(module(i, k.float(), v.float()).unflatten(-1, (8, 4))).exp().mean(0)
        torch.testing.assert_close(driver.probe.scores(i)[0].flatten()[:8], want, rtol=1e-5, atol=1e-9)


def test_a_rank_with_some_of_the_heads_uses_its_own(tmp_path):
    scorer_file(tmp_path / "four.safetensors", layers=1, heads=4, width=16)
    scheduling = {"method": "learned_scores", "budget_tokens": 200, **SMALL, "path": str(tmp_path / "four.safetensors")}
    driver = Driver([replace(layer(0), first_head=2)], page_size=4, scheduling=scheduling)
    driver.prefill([32])
    module = driver.probe.policy.scorer
    k, v = (torch.stack([driver.history[0][0][p][side] for p in range(32)]).transpose(0, 1) for side in (0, 1))
    own, others = (page_scores(module(0, k.float(), v.float(), first).unflatten(-1, (8, 4))).exp().mean(0) for first in (2, 0))
    assert torch.allclose(driver.probe.scores(0)[0].flatten()[:8], own, rtol=1e-5) and not torch.allclose(own, others, rtol=0.1)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"layers": 1, "heads": 2, "width": 16}, "trained for 1 layers, this model has a layer 1"),
        ({"layers": 2, "heads": 1, "width": 16}, "1 KV heads of width 8 and 8 in layer 0, this model has 2"),
        ({"layers": 2, "heads": 2, "width": 24}, "of width 12 and 12"),
    ],
    ids=["layers", "heads", "width"],
)
def test_other_layers_are_refused(made, said, tmp_path):
    scheduling = {"method": "learned_scores", "budget_tokens": 50, **SMALL, **needed("learned_scores", tmp_path, **made)}
    with pytest.raises(ConfigError, match=said):
        Driver([layer(0), layer(1)], scheduling=scheduling)


def test_latents_are_refused(tmp_path):
    scheduling = {
        "method": "learned_scores",
        "budget_tokens": 50,
        **SMALL,
        **needed("learned_scores", tmp_path, layers=1, heads=1, width=16),
    }
    with pytest.raises(ConfigError, match="layer 0 stores a latent"):
        Driver([replace(layer(0), num_kv_heads=1, latent=True)], scheduling=scheduling)


def test_other_files_are_refused(tmp_path):
    """That of quest_mlp is no part; a part of another kind; one whose numbers are broken."""
    old, other, broken = (tmp_path / name for name in ("old", "other", "broken"))
    save_file(mlp_weights(layers=1, heads=2, width=16), old)
    own = PartFile.load(needed("learned_scores", tmp_path, layers=1, heads=2, width=16)["path"], "eviction_scorer")
    replace(own, part="kv_gate").save(other)
    replace(own, weights={name: x * torch.nan for name, x in own.weights.items()}).save(broken)
    for path, said in ((old, "weights of an older form"), (other, "holds the part 'kv_gate'"), (broken, "values that are not")):
        with pytest.raises(ConfigError, match=said):
            Driver([layer(0)], scheduling={"method": "learned_scores", "budget_tokens": 50, **SMALL, "path": str(path)})


def test_a_part_of_another_model_is_refused_where_it_is_attached(tmp_path):
    model, _ = bundled.load()
    path = needed("learned_scores", tmp_path, layers=4, heads=2, width=64)["path"]
    own = PartFile.load(path, "eviction_scorer")
    replace(own, fingerprint=[torch.ones(2, 32) for _ in range(4)], about={"model": "another"}).save(path)
    with pytest.raises(ConfigError, match=r"trained on other weights \(another\): the key projection of layer 0 differs"):
        attach(model, {"page_size": 8, "scheduling": {"method": "learned_scores", "budget_ratio": 0.5, "path": path}})


@torch.no_grad()
def test_the_part_that_is_shipped_keeps_facts_nobody_has_asked_for_yet():
    """Four pass keys in 512 tokens, a quarter of the entries kept before the question comes: all are found, and no key by recency."""
    model, tokenizer = bundled.load()
    prose = Prose(tokenizer, bundled.evaluation_text())
    prompts = [recall_prompt(prose, 507, kind="passkey", depth=(i + 0.5) / 5, seed=7000 + i) for i in range(4)]
    ids, question = torch.tensor([prompt.ids for prompt in prompts]), prompts[0].question_tokens
    found = {}
    for method, own in (("learned_scores", {"path": str(bundled.part_path("eviction_scorer"))}), ("streaming_llm", {})):
        scheduling = {"method": method, "budget_ratio": 0.25, "prefill": "keep", "recent_tokens": 16, "head_budget": "adaptive", **own}
        with attach(model, {"page_size": 8, "scheduling": scheduling}) as cache:
            model(ids[:, :-question], cache=cache, logits_to_keep=1)
            said = []
            for token in ids[:, -question:].split(1, 1):
                answer = model(token, cache=cache).logits[:, -1:].argmax(-1)
            while len(said) < prose.answer_tokens():
                said.append(answer)
                answer = model(answer, cache=cache).logits[:, -1:].argmax(-1)
        texts = [tokenizer.decode(row).strip() for row in torch.cat(said, 1)]
        found[method] = sum(text.startswith(prompt.answer) for text, prompt in zip(texts, prompts, strict=True))
    assert found == {"learned_scores": 4, "streaming_llm": 0}
    with pytest.raises(FileNotFoundError, match="there are: eviction_scorer"):
        bundled.part_path("scorer")


def test_the_gradient(tmp_path):
    """Of page scores to every weight and to keys and values, in f64."""
    layers = LearnedScores(**needed("learned_scores", tmp_path, layers=1, heads=2, width=6)).trained.layers
    torch.manual_seed(0)
    module = EntryScorer(layers, 4).double()
    weights = {name: torch.randn_like(x).requires_grad_() for name, x in module.state_dict().items()}
    k, v = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def scores(k, v, *values):
        said = torch.func.functional_call(module, dict(zip(weights, values, strict=True)), (0, k, v))
        return page_scores(said.unflatten(-1, (2, 2)))

    assert torch.autograd.gradcheck(scores, (k, v, *weights.values()))
