"""What a transformers model computes in its attention modules, shown as it runs, and kept as the windows that parts learn from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pikv_ds.errors import UnsupportedError
from pikv_ds.training.kept import KeptWindows
from pikv_ds.training.recorded import LayerWindow, Window

from .anatomy import find_attentions
from .fingerprint import key_norms
from .model_spec import read_model_spec


class Recorder(KeptWindows):
    """Windows of a frozen model. Runs the model when a window is not kept any more."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        question: Tensor | None = None,
        *,
        keep_bytes: int = 1 << 30,
        any_rank: Callable[[bool], bool] | None = None,
    ) -> None:
        """ids [N, T] int64; question [N, T] bool, None: nothing asks. keep_bytes, any_rank: as KeptWindows.

        Raises: UnsupportedError for a model whose layers store latents (MLA), or have sinks beside the softmax.
        """
        self.model, self.ids = model, ids
        self.question = torch.zeros_like(ids, dtype=torch.bool) if question is None else question
        self.attentions = find_attentions(model)
        self.layers = read_model_spec(model.config, self.attentions)
        for spec in self.layers:
            if spec.latent:
                raise UnsupportedError(
                    f"layer {spec.layer_idx} of {type(model).__name__} stores a latent (MLA), of which no part is trained"
                )
            if getattr(self.attentions[spec.layer_idx], "sinks", None) is not None:
                raise UnsupportedError(f"layer {spec.layer_idx} of {type(model).__name__} has sinks in its softmax, which are not recorded")
        super().__init__(self._run, len(ids), keep_bytes=keep_bytes, any_rank=any_rank)

    def _run(self, index: int) -> Window:
        return recorded(self.model, self.attentions, self.layers, self.ids[index], self.question[index])

    def fingerprint(self) -> list[Tensor]:
        """[H, D] of every layer, for the file."""
        return [key_norms(attention, spec.num_kv_heads) for attention, spec in zip(self.attentions, self.layers, strict=True)]


@torch.no_grad()
def recorded(model: PreTrainedModel, attentions: list[nn.Module], layers: list, ids: Tensor, question: Tensor) -> Window:
    """One window, ids [T], of the whole model in one forward."""
    heads: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}
    hidden: dict[nn.Module, Tensor] = {}

    def enters(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden[module] = (args[0] if args else kwargs["hidden_states"])[0].detach()

    see = {module: lambda q, k, v, module=module: heads.__setitem__(module, (q, k, v)) for module in attentions}
    hooks = [module.register_forward_pre_hook(enters, with_kwargs=True) for module in attentions]
    try:
        with heads_shown(model, see):
            model(ids.unsqueeze(0).to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for module, spec in zip(attentions, layers, strict=True):
        q, k, v = heads[module]
        scale = getattr(module, "scaling", None) or spec.k_dim**-0.5
        found.append(LayerWindow(q=q, k=k, v=v, hidden=hidden[module], scale=float(scale), softcap=spec.softcap, window=spec.window))
    return Window(ids=ids, question=question, layers=tuple(found))


@contextlib.contextmanager
def heads_shown(model: PreTrainedModel, see: dict[nn.Module, Callable[[Tensor, Tensor, Tensor], None]]) -> Iterator[None]:
    """Inside, every attention module in `see` also hands its q [N, Hq, D], k and v [N, H, D] (after RoPE, rows joined) to its function."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        see[module](*(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register("pikv_calibrate", attend)
    model.set_attn_implementation("pikv_calibrate")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
