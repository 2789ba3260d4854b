"""While a model is attached nothing may be dense behind the scenes: the host's own cache and attention raise."""

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class DenseUsed(AssertionError):
    """The host's own KV cache or attention ran although the model is attached."""


def _raise(*args, **kwargs):
    raise DenseUsed("the ordinary cache or attention was used while the model is attached to PiKV")


@contextlib.contextmanager
def host_is_forbidden(model: PreTrainedModel) -> Iterator[None]:
    """DynamicCache.update, its layers' update, the model's eager attention and every registered dense attention raise."""
    modeling = {module for part in model.modules() if hasattr(module := sys.modules[type(part).__module__], "eager_attention_forward")}
    names = [name for name in AttentionInterface._global_mapping if name != "pikv"]
    with contextlib.ExitStack() as stack:
        for owner in (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer):
            stack.enter_context(mock.patch.object(owner, "update", _raise))
        for module in modeling:
            stack.enter_context(mock.patch.object(module, "eager_attention_forward", _raise))
        stack.enter_context(mock.patch.dict(AttentionInterface._global_mapping, dict.fromkeys(names, _raise)))
        yield
