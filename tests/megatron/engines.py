"""Megatron's DynamicInferenceEngine driven step by step, and what its answers are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from tests.megatron import dynamic_script
from tests.megatron.models import tokens
from tests.megatron.runs import full_forward


@dataclass
class Served:
    """What an engine answered, and how it got there."""

    answers: dict[int, list[int]] = field(default_factory=dict)
    log_probs: dict[int, list[float]] = field(default_factory=dict)
    steps: int = 0
    idle: int = 0  # dummy forwards
    chunked: int = 0  # steps that ran a part of a prompt

    @property
    def how(self) -> tuple[int, int, int]:
        return self.steps, self.idle, self.chunked


def prompts(count: int, seed: int, longest: int = 120) -> list[list[int]]:
    """Of lengths spread up to `longest`, so that some are prefilled in chunks."""
    return [tokens(1, 3 + (longest - 3) * i // max(1, count - 1), seed=100 * seed + i)[0].tolist() for i in range(count)]


def serve(engine, asked: dict[int, list[int]], num_tokens: int, group=None, args=None) -> Served:
    """Greedy. group: ranks that run the same number of forwards; one without requests runs the controller's dummy_forward."""
    for number, prompt in asked.items():
        engine.add_request(number, prompt, dynamic_script.sampling(num_tokens + number % 3, args))
    served = Served()
    while True:
        busy = torch.tensor([int(engine.has_unfinished_requests())])
        if group is not None:
            dist.all_reduce(busy, op=dist.ReduceOp.MAX, group=group)
        if not busy:
            return served
        served.steps += 1
        if not engine.has_unfinished_requests():
            engine.controller.dummy_forward()
            served.idle += 1
            continue
        result = engine.step_modern()
        served.chunked += engine.context.chunked_prefill_request_id != -1
        for record in result["finished_request_records"]:
            request = record.merge()
            served.answers[request.request_id] = list(request.generated_tokens)
            served.log_probs[request.request_id] = request.generated_log_probs


def wrong(model, asked: dict[int, list[int]], answers: dict[int, list[int]], group=None) -> list[int]:
    """Requests whose greedy tokens are not those of one full forward over prompt and answer. The model must be the host's own."""
    rounds, found = torch.tensor([len(asked)]), []
    if group is not None:  # expert-parallel ranks run the same number of forwards
        dist.all_reduce(rounds, op=dist.ReduceOp.MAX, group=group)
    for _ in range(int(rounds) - len(asked)):
        full_forward(model, tokens(1, 1, seed=0))
    for number, prompt in asked.items():
        alone = full_forward(model, torch.tensor([prompt + answers.get(number, [])]))[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        if number not in answers or alone != answers[number]:
            found.append(number)
    return found
