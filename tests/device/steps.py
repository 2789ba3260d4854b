"""Decode steps of an attached model on `far`, and what kept the host waiting in each. B rows, T tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import pikv_ds
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from tests.device.far import Far, FarTensor, to_far
from tests.tiny_models import prompt, tiny_model

FIRST, STEPS = 4, 8  # steps that are not counted, tables grow in them; and those that are
DENSE = ("qwen3_dense", "gemma2")


@dataclass
class Counted:
    """Per step, on average. theirs: what the host, transformers, does by itself."""

    stops: dict[str, float] = field(default_factory=dict)
    waits: float = 0.0
    theirs: float = 0.0
    outputs: list[Tensor] = field(default_factory=list)
    """Logits of each step, or the tokens of generate()."""

    @property
    def ours(self) -> float:
        return sum(self.stops.values())


def decoded(family: str, block: dict, *, how: str, far: Far | None, group=None, seed: int = 2) -> Counted:
    """how: "loop" of forwards with a cache; "padded", the same with a mask; "generate"; "generate padded".

    far: entered; None: on the CPU.
    """
    model = tiny_model(family)
    if family not in DENSE:
        model.set_experts_implementation("batched_mm")  # one that asks no tensor how many tokens an expert has
    there = (lambda x: x) if far is None else FarTensor
    model = model if far is None else to_far(model)
    ids = torch.cat([prompt(21, seed=seed + row) for row in range(2)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    steps = _Steps(far)
    with torch.no_grad(), pikv_ds.attach(model, block, group=group) as cache:
        if how.startswith("generate"):
            model.generate(
                there(ids), max_new_tokens=FIRST + STEPS + 1, do_sample=False, eos_token_id=None,
                stopping_criteria=StoppingCriteriaList([steps]), **({"attention_mask": there(mask)} if "padded" in how else {}),
            )  # fmt: skip
        else:
            model(there(ids), past_key_values=cache, **({"attention_mask": there(mask)} if "padded" in how else {}))
            for i in range(FIRST + STEPS):
                wider = torch.cat([mask, mask.new_ones(2, i + 1)], 1)
                given = {"attention_mask": there(wider)} if "padded" in how else {}
                steps.outputs.append(model(there(ids[:, i % 20 : i % 20 + 1]), past_key_values=cache, **given).logits)
                steps.ended()
                if far is not None:
                    check_sizes(cache.core)
    return steps.counted()


class _Steps(StoppingCriteria):
    """Looks at the counters between steps; as a criterion, whenever generate() has made a token."""

    def __init__(self, far: Far | None) -> None:
        self.far, self.outputs, self.seen = far, [], []

    def __call__(self, input_ids: Tensor, scores: tuple, **kwargs: Any) -> Tensor:
        self.outputs.append(input_ids[:, -1].clone())
        self.ended()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def ended(self) -> None:
        if self.far is not None:
            self.seen.append((Counter(self.far.stops), sum(self.far.waits.values())))
            self.far.next_step()

    def counted(self) -> Counted:
        outputs = [x.held if isinstance(x, FarTensor) else x for x in self.outputs]
        if self.far is None:
            return Counted(outputs=outputs)
        (before, waited), (after, waits) = self.seen[-STEPS - 1], self.seen[-1]
        per_step = {f"{kind} at {place}": n / STEPS for (kind, place), n in (after - before).items()}
        ours = {what: n for what, n in per_step.items() if " at pikv_ds/" in what or " at ops/" in what}
        return Counted(ours, (waits - waited) / STEPS, sum(per_step.values()) - sum(ours.values()), outputs)


def check_sizes(cache: PiKVCache) -> None:
    """What the host knows of sizes without asking is what they are."""
    for known, real in CacheProbe(cache).known_sizes:
        assert torch.equal(known, real.held.to(torch.int64))
