"""A retention policy of your own, in a script: a class with a decorator, then its name in the "pikv" block.

    python examples/own_method.py

To have it in every script, by configuration alone, put the class into a distribution with an entry point of the group "pikv_ds.methods".
tests/outside_package/ is one, with a codec, a router and a policy; docs/CONTRIBUTING.md says how (Methods outside this repository).
"""

import torch
from torch import Tensor

import pikv_ds
from pikv_ds import bundled
from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, TokenPolicy


@POLICIES.register("long_values")
class LongValues(TokenPolicy):
    """Keep entries with long values: score(entry) = ||v||_2, mean over heads."""

    def entry_scores(self, pages: Pages) -> Tensor:
        return torch.linalg.vector_norm(pages.values, dim=-1).mean(3)  # [R, S, C, page_size]


model, tokenizer = bundled.load(torch.float32)
ids, answer = bundled.passkey_prompt(tokenizer, 600)
config = {"page_size": 8, "scheduling": {"method": "long_values", "budget_ratio": 0.5}}
with pikv_ds.attach(model, config) as cache:
    text = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    stats = cache.stats()
kept, left = stats["entries_live"], stats["entries_evicted"]
print(f"{tokenizer.decode(text[0, len(ids) :])!r} expected {answer} entries kept {kept} left {left}")
