"""The probe: before a model is attached, its attention modules run on random hidden states, as they are and through PiKV.

Nothing else of the layers runs that need not: experts and what comes behind attention are left out, and so are collectives. What PiKV can't
reproduce is refused by name. Under ZeRO-3 the weights of one module are gathered at a time, which all ranks of the model do alike.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import UnsupportedError
from pikv_ds.exchange.exchange import Exchange

from .at_rest import at_rest
from .attachment import Attachment
from .cache import HFCache
from .forward_hooks import ForwardHooks
from .host import Host
from .latent import rounding
from .ordinary import unusual
from .probe_rig import CannotProbe, Rig

_COLUMNS = (5, 2, 1)  # a prompt, a chunk, a decode step
_ROWS = 2
_ADVICE = "use the host's own cache"


def probe(host: Host, config: PiKVConfig, group: dist.ProcessGroup | None) -> float:
    """The seconds it took, 0 where config.probe leaves it out. The model is as before: hooks, modes, buffers, random numbers.

    Raises: UnsupportedError, on all ranks of the group if on one. Collectives: a frame over the group, if there was a probe; under ZeRO-3
        gathers of the weights that run.
    """
    if config.probe == "never" or (config.probe == "auto" and not any(unusual(attention) for attention in host.attentions)):
        return 0.0
    started, refusal = time.perf_counter(), None
    try:
        _probe(host)
    except UnsupportedError as error:
        refusal = error
    if group is not None:
        _agree(refusal, Exchange(group, config.timeout_s, host.device))
    if refusal is not None:
        raise refusal
    return time.perf_counter() - started


def _agree(refusal: UnsupportedError | None, exchange: Exchange) -> None:
    """Raises: UnsupportedError on a rank whose own probe went well when that of another did not."""
    refused = exchange.gather_ints([int(refusal is not None)], exchange.device, "probing the model's attention")
    ranks = [rank for rank, (yes,) in enumerate(refused) if yes]
    if ranks and refusal is None:
        raise UnsupportedError(f"the probe of rank {ranks[0]} of {exchange.size} refused the model, see its error: no rank is attached")


@torch.no_grad()
def _probe(host: Host) -> None:
    with at_rest(host.model, host.device), Rig(host) as rig:
        ids = _ids(host)
        try:
            rig.settle(ids, lambda: DynamicCache(config=host.decoder.config))
            expected = _run(rig, ids, DynamicCache(config=host.decoder.config))
        except CannotProbe as error:
            raise UnsupportedError(
                f"the attention of {host.name} can't be run on random hidden states ({error}), so PiKV can't tell whether it reproduces "
                "it; 'probe': 'never' attaches without knowing"
            ) from error
        attachment = Attachment(host, PiKVConfig(storage={"expert_ids": "hash"}), None)
        try:
            host.add(attachment)
            host.hooks.append(ForwardHooks(host))
            got = _run(rig, ids, HFCache(attachment.take()))
        except CannotProbe as error:
            raise UnsupportedError(f"the attention of {host.name} runs by itself, but not through PiKV ({error}); {_ADVICE}") from error
        finally:
            attachment.detach()
            host.hooks.clear()
    for (layer, own), (_, other) in zip(expected, got, strict=True):
        _compare(host, layer, own, other)


def _ids(host: Host) -> Tensor:
    """Any token ids [B, T]: what leads to attention runs on them, attention does not."""
    vocabulary = host.model.config.get_text_config(decoder=True).vocab_size
    return torch.arange(_ROWS * sum(_COLUMNS), device=host.device).view(_ROWS, -1) % vocabulary


def _run(rig: Rig, ids: Tensor, cache) -> list[tuple[int, Tensor]]:
    """The outputs of all attention modules in the forwards of a short conversation: (layer, [B, T, width])."""
    return [output for part in ids.split(_COLUMNS, 1) for output in rig.forward(part, cache)]


def _compare(host: Host, layer: int, own: Tensor, other: Tensor) -> None:
    name = f"layer {layer} ({type(host.attentions[layer]).__name__})"
    if own.shape != other.shape:
        raise UnsupportedError(f"{name} returns {tuple(own.shape)}, through PiKV {tuple(other.shape)}; {_ADVICE}")
    off, largest = float((own.float() - other.float()).abs().max()), float(own.float().abs().max())
    if not off <= rounding(own.dtype) * largest:
        raise UnsupportedError(
            f"{name} computes something else than PiKV reproduces: on random hidden states outputs of up to {largest:.2g} differ by "
            f"{off:.2g}; {_ADVICE}"
        )
