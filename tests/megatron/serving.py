"""Dynamic batching without Megatron's dynamic engine, which needs CUDA graphs and zmq: its schedule, step by step, over a real context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.transformer.attention import Attention

from tests.megatron.hosts import blocks_in_use, dummy_forward, engine_runs, inference_wrapper
from tests.megatron.models import tokens


@dataclass
class Request:
    number: int
    arrival: int  # step of its rank's loop
    prompt: list[int]
    num_tokens: int  # to generate
    generated: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)  # of every generated token

    def as_megatron(self) -> DynamicInferenceRequest:
        return DynamicInferenceRequest(
            request_id=self.number,
            prompt_tokens=torch.tensor(self.prompt + self.generated),
            sampling_params=SamplingParams(num_tokens_to_generate=self.num_tokens - len(self.generated), termination_id=-1),
        )


@dataclass
class Log:
    steps: int = 0
    idle: int = 0
    paused: int = 0  # steps with a paused request
    evicted: int = 0
    most_blocks: int = 0


def random_requests(count: int, longest: int, seed: int) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(1, high + 1, (1,), generator=generator))

    lengths = [1, longest, *(draw(longest) for _ in range(count - 2))][:count]
    return [
        Request(number=i, arrival=draw(12) - 1, prompt=tokens(1, n, seed=1000 * seed + i)[0].tolist(), num_tokens=draw(14))
        for i, n in enumerate(lengths)
    ]


def serve(model, context, requests: list[Request], *, group=None, chunk: int | None = None, each_step=None) -> Log:
    """Greedy; fills every request's `generated`. group: ranks that run the same number of forwards, dummy ones where there is no work.

    chunk: prefill at most so many tokens of a prompt at a time, as the engine's chunked prefill does.
    """
    with engine_runs():
        return _serve(model, context, requests, group, chunk, each_step)


def _serve(model, context, requests: list[Request], group, chunk: int | None, each_step) -> Log:
    wrapper = inference_wrapper(model, context)
    log, waiting, by_number = Log(), sorted(requests, key=lambda r: r.arrival), {r.number: r for r in requests}
    partial: DynamicInferenceRequest | None = None  # being prefilled in chunks; always the last of the active requests
    while True:
        queue = [r for r in waiting if r.arrival <= log.steps]
        while queue and partial is None:
            candidate = queue[0].as_megatron()
            if not all(context.check_availability(candidate)):
                break
            waiting.remove(queue.pop(0))
            partial = _admit(context, candidate, chunk)
        busy = torch.tensor([int(bool(waiting) or context.has_unfinished_requests())])
        own = context.get_active_request_count() > 0
        if group is not None:
            dist.all_reduce(busy, op=dist.ReduceOp.MAX, group=group)
        if not busy:
            return log
        log.steps += 1
        if own:
            evicted = _step(wrapper, context, by_number, partial)
            partial = None if partial is None else _admit(context, partial, chunk)
            log.evicted += len(evicted)
            waiting = [by_number[number] for number in evicted] + waiting
        elif group is not None:
            dummy_forward(wrapper)
            log.idle += 1
        log.paused += context.paused_request_count > 0
        log.most_blocks = max(log.most_blocks, blocks_in_use(context))
        if each_step is not None:
            each_step()


def _admit(context, request: DynamicInferenceRequest, chunk: int | None) -> DynamicInferenceRequest | None:
    """Returns the request when more of its prompt is to come."""
    length = request.remaining_prompt_length if chunk is None else min(chunk, request.remaining_prompt_length)
    context.chunked_prefill_request_id = -1
    context.add_request(request, length)
    request.remaining_prompt_tokens = request.remaining_prompt_tokens[length:]
    request.finished_chunk_token_count += length
    more = request.remaining_prompt_length > 0
    if more:
        context.chunked_prefill_request_id = request.request_id
    return request if more else None


def _step(wrapper, context, by_number: dict[int, Request], partial: DynamicInferenceRequest | None) -> list[int]:
    """One forward and what the engine does after it. Returns the requests that lost their blocks and start again."""
    context.initialize_attention_state()
    ids, at = context.current_input_and_position_ids()
    with torch.inference_mode():
        logits = wrapper.run_one_forward_step({"tokens": ids, "position_ids": at, "attention_mask": None})[0]
    active = context.request_ids[context.paused_request_count : context.total_request_count].tolist()
    new_tokens, mask = logits[: len(active)].argmax(-1), torch.ones(len(active), dtype=torch.int32)
    for i, number in enumerate(active):
        request = by_number[number]
        if partial is not None and number == partial.request_id:
            continue  # what a chunk that is not the last one predicts is of no use
        request.generated.append(int(new_tokens[i]))
        request.logits.append(logits[i].clone())
        mask[i] = len(request.generated) < request.num_tokens
    changes = context.update_requests(mask, new_tokens) or {}
    evicted = changes.get("evict_request_ids")
    return [] if evicted is None else evicted.tolist()


@contextlib.contextmanager
def reference_flash_decode() -> Iterator[None]:
    """Megatron's own DynamicInferenceContext on CPU: attention over its block buffer in plain torch, where it would call flash-attn."""

    def attend(
        self, q, k, v, max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k, seqlens_k, block_table, is_decode_only, softmax_offset=None
    ):
        assert softmax_offset is None, "the reference knows no sinks"
        out = torch.zeros_like(q)
        bounds, lengths = cu_seqlens_q.tolist(), seqlens_k.tolist()
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if end == begin or lengths[i] == 0:
                continue
            keys, values = (x[block_table[i].long().clamp_min(0)].flatten(0, 1)[: lengths[i]].transpose(0, 1) for x in (k, v))
            queries, n = q[begin:end, 0].transpose(0, 1), end - begin
            mask = torch.ones(n, lengths[i], dtype=torch.bool).tril(lengths[i] - n)
            own = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            out[begin:end, 0] = own.transpose(0, 1)
        return out

    with mock.patch.object(Attention, "flash_decode_and_prefill", attend):
        yield
