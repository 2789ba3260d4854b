"""Shared by the exactness jobs: the ordinary run, the same run over the sharded cache, and what must hold between them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist

import pikv_ds
from tests.host_guard import host_is_forbidden

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "barrier",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
    "reduce",
    "batch_isend_irecv",
)


@dataclass
class Run:
    tokens: torch.Tensor
    logits: torch.Tensor  # [steps, B, vocab]
    stats: dict = field(default_factory=dict)

    def difference(self, other: "Run") -> float:
        return (self.logits - other.logits).abs().max().item()


def generate(model, ids, mask=None, *, new_tokens: int, **options) -> Run:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return Run(out.sequences, torch.stack(out.logits))


def generate_sharded(model, ids, mask=None, *, new_tokens: int, config=None, group=None, **options) -> Run:
    with pikv_ds.attach(model, config, group) as cache, host_is_forbidden(model):
        run = generate(model, ids, mask, new_tokens=new_tokens, **options)
        run.stats = cache.stats()
    return run


def assert_same(run: Run, reference: Run, tolerance: float) -> None:
    difference = run.difference(reference)
    assert torch.equal(run.tokens, reference.tokens), f"tokens differ; largest logit difference {difference:.2e}"
    assert difference <= tolerance, f"logits differ by {difference:.2e} > {tolerance:.0e}"


def assert_conserved(stats: dict, group=None) -> None:
    names = ("entries_appended", "entries_live", "entries_expired", "entries_evicted", "entries_cropped", "entries_forked")
    sums = torch.tensor([stats[n] for n in names])
    if group is not None:
        dist.all_reduce(sums, group=group)
    appended, live, expired, evicted, cropped, forked = sums.tolist()
    # Beams of one request expire whole pages at different times, so a fork may carry a few entries more or less than the row it replaces.
    assert appended > 0 and live + expired + evicted + cropped == appended + forked, dict(zip(names, sums.tolist(), strict=True))
    assert forked == 0 or expired > 0, f"forks gained or lost entries: {forked}"


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Every call into torch.distributed as (name, bytes this rank sends to others), in order."""
    calls: list[tuple[str, int]] = []

    def wrap(name):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            calls.append((name, _bytes_sent(name, args, kwargs)))
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in filter(lambda name: hasattr(dist, name), COLLECTIVES):
            stack.enter_context(mock.patch.object(dist, name, wrap(name)))
        yield calls


def _bytes_sent(name: str, args: tuple, kwargs: dict) -> int:
    size, rank = dist.get_world_size(kwargs.get("group")), dist.get_rank(kwargs.get("group"))
    if name in ("all_gather_into_tensor", "all_gather_single"):
        return (size - 1) * args[1].nbytes
    if name == "all_to_all_single":
        rows = args[3] if len(args) > 3 else [args[1].shape[0] // size] * size
        return (sum(rows) - rows[rank]) * (args[1].nbytes // max(sum(rows), 1))
    return 0
