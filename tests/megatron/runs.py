"""One generation through a context, the reference it is compared with, and what must hold afterwards."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.communication_utils import (
    broadcast_from_last_pipeline_stage,
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)
from megatron.core.transformer.attention import Attention

from pikv_ds.megatron_patch import install, uninstall
from tests.megatron.models import causal_mask, positions


def decode(model, context, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Feed `ids` in pieces of so many columns, the rest one by one. Rows with longer prompts are fed theirs while others generate, as
    StaticInferenceEngine does. Returns the last logits of every forward, [forwards, B, V]."""
    context.reset()
    logits, done = [], 0
    pieces = pieces + [1] * (ids.shape[1] - sum(pieces))
    with torch.no_grad():
        for columns in pieces:
            logits.append(step(model, context, ids[:, done : done + columns]))
            done += columns
    return torch.stack(logits)


def step(model, context, ids: torch.Tensor) -> torch.Tensor:
    start, columns = context.sequence_len_offset, ids.shape[1]
    mask = causal_mask(columns, start) if columns > 1 else None
    out = model(ids, positions(ids, start), mask, inference_context=context, runtime_gather_output=True)
    context.increment_sequence_len_offset(columns)
    return out[:, -1]


def full_forward(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V], without any cache; over pipeline stages every rank gets them."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            hidden = torch.empty(ids.shape[1], ids.shape[0], model.config.hidden_size)
            recv_from_prev_pipeline_rank_(hidden)
            model.set_input_tensor(hidden)
        out = model(ids, positions(ids), causal_mask(ids.shape[1]), runtime_gather_output=True)
        if stages == 1:
            return out
        last = parallel_state.is_pipeline_last_stage()
        if not last:
            send_to_next_pipeline_rank(out)
        return broadcast_from_last_pipeline_stage([*ids.shape, model.vocab_size], torch.float32, out.contiguous() if last else None)


@contextlib.contextmanager
def dense_is_forbidden() -> Iterator[None]:
    """Megatron's own allocation of a dense KV buffer raises."""

    def refuse(*args, **kwargs):
        raise AssertionError("a dense KV buffer was allocated")

    with mock.patch.object(Attention, "_allocate_memory", refuse):
        yield


@contextlib.contextmanager
def installed(block: dict) -> Iterator[None]:
    """megatron_patch.install(block), and everything the host's again afterwards."""
    assert install(block)
    try:
        yield
    finally:
        assert uninstall()


def assert_conserved(context, expected_live: int | None = None) -> None:
    """Entries of this rank's requests, summed over the group, are each stored once. expected_live: of this rank (replicated: of all)."""
    stats, group = context.stats(), context.core.exchange.group
    names = ("entries_appended", "entries_forked", "entries_live", "entries_expired", "entries_evicted", "entries_cropped")
    sums = torch.tensor([stats[name] for name in names] + [expected_live or 0])
    if group is not None:
        dist.all_reduce(sums, group=group)
    appended, forked, live, *gone, expected = sums.tolist()
    if stats["requests"] == "replicated":
        expected //= group.size()
    assert appended + forked == live + sum(gone), dict(zip(names, sums.tolist(), strict=False))
    assert expected_live is None or live == expected, f"{live} entries live, {expected} expected"


def refused(kind: type[Exception], match: str, call: Callable[[], object]) -> None:
    """`call` raises `kind` with `match` in its message."""
    try:
        call()
    except kind as error:
        assert match in str(error), f"{match!r} not in {error}"
    else:
        raise AssertionError(f"no {kind.__name__} where {match!r} was expected")
