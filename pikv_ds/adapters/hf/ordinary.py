"""Attention that needs no probe: a class of transformers' own with ordinary weights. tests/survey runs every such family."""

from __future__ import annotations

from torch import nn

_OWN = ("transformers.models.", "transformers.pytorch_utils", "transformers.activations", "transformers.modeling_", "torch.nn.modules.")


def unusual(attention: nn.Module) -> str | None:
    """What makes an attention module one to probe; None: nothing does."""
    for path, module in attention.named_modules():
        what = path or "it"
        if not type(module).__module__.startswith(_OWN):
            return f"{what} is a {type(module).__name__} of {type(module).__module__}"
        if "forward" in module.__dict__:
            return f"the forward of {what} was replaced"
        for name, weight in module.named_parameters(recurse=False):
            if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
                return f"{name} of {what} is no ordinary weight"
    dtypes = {module.weight.dtype for module in attention.modules() if isinstance(module, nn.Linear)}
    return f"its projections have several dtypes ({', '.join(sorted(map(str, dtypes)))})" if len(dtypes) > 1 else None
