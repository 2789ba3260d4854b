"""Attach an expert-sharded cache to a transformers model, by hooks and one registered attention function. No model file is edited."""

from __future__ import annotations

import torch.distributed as dist
import transformers
from torch import nn
from transformers import PreTrainedModel

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.modes import eager

from .attached import AttachedCache
from .attachment import Attachment
from .cache import HFCache
from .checks import check_model
from .forward_hooks import ForwardHooks
from .generate_hooks import GenerateHooks
from .host import Host
from .probe import probe
from .versions import warn_if_untested
from .weights_at import dtype_of


@eager
def attach(model: PreTrainedModel, config=None, group: dist.ProcessGroup | None = None, *, requests: str | None = None) -> AttachedCache:
    """Run every generate() and every forward with a cache through PiKV over `group`, until detach() or the end of the `with` block.

    Args:
        model: a decoder of transformers, in eval or train mode; forwards in train mode are left to the host. Also a PeftModel around one.
        config: the "pikv" block: PiKVConfig, dict, JSON path, or None for the defaults.
        group: the expert-parallel process group (any backend); None = one rank, no communication.
        requests: overrides config.storage.requests.

    Returns:
        AttachedCache, a transformers Cache and context manager with new_cache(), stats(), reset(), lockstep(), detach().

    Raises:
        ConfigError: a key that does not fit this model or this group.
        UnsupportedError: a layer type, dtype or attention that PiKV cannot honour exactly; also what the probe of another rank refused.

    Collectives: none, but for a probe (one frame over the group; under ZeRO-3 gathers) and a penalty on gates that need them
        (HostPenalty). The group must have been created; its own timeout bounds NCCL, pikv.timeout_s bounds gloo.
    """
    model = _without_peft(model)
    host = Host.of(model)
    if host is not None and host.attached is not None:
        raise UnsupportedError(
            f"{host.name} is attached already: new_cache() of what attach returned makes more caches, detach() ends them"
        )
    attachment = _attachment(model, _parsed(config, requests), group)
    attachment.attached = AttachedCache(attachment)
    return attachment.attached


class Cache(HFCache):
    """A PiKV cache to pass as `cache` or `past_key_values`, as a DynamicCache is; forwards that are given none stay with the host's own.

    Any number may live at once on one model, also with different configurations. The model's hooks go with the last of them.
    """

    def __init__(self, model: PreTrainedModel, config=None, group: dist.ProcessGroup | None = None, *, requests: str | None = None) -> None:
        """Args and Raises: as attach. config None on a model that is attached: that of attach."""
        model = _without_peft(model)
        host, parsed = Host.of(model), _parsed(config, requests)
        found = None
        if host is not None:
            same = (one for one in host.attachments if one.matches(parsed, group))
            found = host.attached.owner if config is None and host.attached is not None else next(same, None)
        super().__init__((found or _attachment(model, parsed, group)).take())


def _without_peft(model: nn.Module) -> nn.Module:
    """The model inside of a PeftModel, which runs it with the adapters in its layers."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None or isinstance(model, PreTrainedModel) else inner()


def _parsed(config, requests: str | None) -> PiKVConfig:
    config = PiKVConfig.parse(config)
    if not config.enabled:
        raise ConfigError("pikv.enabled is false: attach would have no effect; drop the call or enable the block")
    if requests is None:
        return config
    return config.model_copy(update={"storage": config.storage.model_copy(update={"requests": requests})})


def _attachment(model: PreTrainedModel, config: PiKVConfig, group: dist.ProcessGroup | None) -> Attachment:
    """Hooked into the model. Raises as attach; the model is as before then."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"attach needs a transformers PreTrainedModel, got {type(model).__name__}; for an engine pass engine.module")
    host, new = Host.of(model), False
    if host is None:
        warn_if_untested(transformers.__version__)
        host, new = Host(model), True
        check_model(model, host.attentions, host.specs, dtype_of(model), group)
        host.probe_s = probe(host, config, group)
    attachment = Attachment(host, config, group)
    host.add(attachment)
    if new:
        forwards = ForwardHooks(host)
        host.hooks.append(forwards)
        if hasattr(model, "generate"):  # base models and heads have none
            host.hooks.append(GenerateHooks(host, forwards))
    return attachment
