"""The target of eviction scores: largest shares, in plain loops, and beside what the policy kvzip counts in a real rehearsal."""

import math
from dataclasses import replace

import pytest
import torch

from pikv_ds import attach, bundled
from pikv_ds.adapters.hf.record import Recorder
from pikv_ds.adapters.hf.rehearse import rehearse
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.training.rehearsal import page_peaks
from tests.training.windows import window


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_peaks(softcap):
    layer = replace(window(5, tokens=18).layers[0], softcap=softcap)
    asking, first, page_size = torch.arange(11, 18), 2, 3
    want = torch.zeros(2, 3, dtype=torch.float64)
    for at in asking.tolist():
        for h in range(2):
            of_pages = [0.0] * 3
            for g in range(2):
                logits = [float(layer.q[at, 2 * h + g].double() @ layer.k[t, h].double()) * layer.scale for t in range(at + 1)]
                logits = [x if softcap is None else softcap * math.tanh(x / softcap) for x in logits]
                total = sum(map(math.exp, logits))
                for page in range(3):
                    begin = first + page * page_size
                    of_pages[page] += sum(math.exp(x) for x in logits[begin : begin + page_size]) / total / 2
            want[h] = torch.maximum(want[h], torch.tensor(of_pages, dtype=torch.float64))
    torch.testing.assert_close(page_peaks(layer, asking, first, 3, page_size).double(), want, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_they_are_what_a_rehearsal_counts():
    """Of the bundled model: pages of 8 of a prompt of 48 tokens, mean over kv heads, and the store's own count."""
    model, _ = bundled.load()
    ids = torch.randint(5, 2000, (1, 48), generator=torch.Generator().manual_seed(2))
    block = {"page_size": 8, "scheduling": {"method": "kvzip", "budget_tokens": 400, "prefill": "keep"}}
    with attach(model, block) as cache:
        model(ids, cache=cache)
        rehearse(model, cache, ids[:, 1:])
        counted = [CacheProbe(cache.core).scores(i)[0, 0, :6] for i in range(4)]
    twice = Recorder(model, torch.cat([ids, ids[:, 1:]], 1))[0]
    for layer, own in zip(twice.layers, counted, strict=True):
        torch.testing.assert_close(of_all_heads(layer), own, rtol=1e-4, atol=1e-6)


def of_all_heads(layer) -> torch.Tensor:
    """The store counts the mean over all query heads before it takes the largest: as one kv head would."""
    group = layer.q.shape[1] // layer.k.shape[1]
    q = layer.q.unflatten(1, (-1, group))
    keys, asking = layer.k.transpose(0, 1), torch.arange(48, 95)
    logits = layer.scale * torch.einsum("qhgd,htd->qhgt", q[asking], keys)
    share = logits.masked_fill((torch.arange(95) > asking.unsqueeze(1))[:, None, None], -torch.inf).softmax(-1)
    per_head = share[..., :48].unflatten(-1, (6, 8)).sum(-1).mean(2)  # [Q, H, C]
    torch.testing.assert_close(per_head.amax(0), page_peaks(layer, asking, 0, 6, 8), rtol=1e-4, atol=1e-7)
    return per_head.mean(1).amax(0)
