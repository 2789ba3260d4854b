"""Every call into torch.distributed while a run is recorded, the host's own included: how many of each kind, and what this rank put in."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist

# torch 2.13 renamed some; both names are one kind.
KINDS = {
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "all_reduce": "all_reduce",
    "all_to_all": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
    "broadcast": "broadcast",
    "gather": "gather",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "scatter": "scatter",
    "send": "send",
    "isend": "send",
    "recv": "recv",
    "irecv": "recv",
    "batch_isend_irecv": "send",
}
GIVEN_SECOND = ("all_gather", "all_to_all", "reduce_scatter", "scatter")  # (output, input)


@contextlib.contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """kind -> [calls, bytes of the tensors given]. Calls that others bound to names of their own before are not seen."""
    counts: dict[str, list[int]] = {}

    def wrap(name: str, kind: str):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            count = counts.setdefault(kind, [0, 0])
            count[0] += 1
            count[1] += _given_bytes(kind, args, kwargs)
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name, kind in KINDS.items():
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, wrap(name, kind)))
        yield counts


def _given_bytes(kind: str, args: tuple, kwargs: dict) -> int:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor | list)]
    if not tensors:
        return 0
    given = tensors[1] if kind in GIVEN_SECOND and len(tensors) > 1 else tensors[0]
    return sum(t.nbytes for t in ([given] if isinstance(given, torch.Tensor) else given) if isinstance(t, torch.Tensor))
