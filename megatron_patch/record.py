"""Windows of a frozen Megatron-Core GPT model: what its attention computes, for the parts that learn from it.

Tensor-parallel ranks have parts of the heads. A window has all of them, gathered, on every such rank: a part is small, and one that was
trained on some heads would fit one layout only. T tokens, H kv heads, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec
from pikv_ds.training.kept import KeptWindows
from pikv_ds.training.recorded import LayerWindow, Window

from .layers import Layer, find_layers, is_latent, key_norms


class MegatronRecorder(KeptWindows):
    """All ranks of the job ask for windows in step: experts, and heads, lie on several."""

    def __init__(
        self, model: nn.Module, layers: Sequence[LayerSpec], ids: Tensor, question: Tensor | None = None, *, keep_bytes: int = 1 << 30
    ) -> None:
        """model: not enabled, in eval mode. layers: of the whole model. ids [N, T] int64, question [N, T] bool as for Recorder.

        Raises: UnsupportedError for latents (MLA), pipeline stages, sequence parallelism, KV heads that ranks share.
        """
        self.model, self.layers, self.ids = model, list(layers), ids
        self.question = torch.zeros_like(ids, dtype=torch.bool) if question is None else question
        self.found = find_layers(model)
        _check(self.found, self.layers)
        super().__init__(self._run, len(ids), keep_bytes=keep_bytes, any_rank=_any_rank)

    def fingerprint(self) -> list[Tensor]:
        """[H, D] f64 of every layer, of all heads. Collective over tensor-parallel ranks."""
        return [_gathered(key_norms(layer.attention), 0).cpu() for layer in self.found]

    @torch.no_grad()
    def _run(self, index: int) -> Window:
        seen: dict[nn.Module, dict[str, Tensor]] = {layer.attention: {} for layer in self.found}
        hooks = [hook for layer in self.found for hook in _hooks(layer.attention, seen[layer.attention])]
        ids = self.ids[index : index + 1].to(next(self.model.parameters()).device)
        places = torch.arange(ids.shape[1], device=ids.device)
        # Megatron's convention: True hides.
        hidden = torch.ones(len(places), len(places), dtype=torch.bool, device=ids.device).triu(1)[None, None]
        try:
            self.model(ids, places[None], hidden)
        finally:
            for hook in hooks:
                hook.remove()
        windows = [_window(layer.attention, spec, seen[layer.attention]) for layer, spec in zip(self.found, self.layers, strict=True)]
        return Window(ids=self.ids[index], question=self.question[index], layers=tuple(windows))


def _window(attention: nn.Module, spec: LayerSpec, seen: dict[str, Tensor]) -> LayerWindow:
    heads = {name: _gathered(seen[name], 1) for name in "qkv"}
    scale = attention.config.softmax_scale or spec.k_dim**-0.5
    return LayerWindow(**heads, hidden=seen["hidden"], scale=float(scale), softcap=spec.softcap, window=spec.window)


def _hooks(attention: nn.Module, seen: dict[str, Tensor]) -> list:
    """hidden [T, W]; q [T, Hq, D], k and v [T, H, D] of this rank's heads, as the core attention gets them: rotated."""

    def enters(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["hidden"] = (args[0] if args else kwargs["hidden_states"])[:, 0].detach()

    def attends(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.update({name: x[:, 0].detach() for name, x in zip("qkv", args, strict=False)})

    return [
        attention.register_forward_pre_hook(enters, with_kwargs=True),
        attention.core_attention.register_forward_pre_hook(attends, with_kwargs=True),
    ]


def _gathered(own: Tensor, dim: int) -> Tensor:
    """Heads of all tensor-parallel ranks, which have them in order."""
    group = parallel_state.get_tensor_model_parallel_group()
    size = dist.get_world_size(group)
    if size == 1:
        return own
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts, dim)


def _any_rank(is_so: bool) -> bool:
    flag = torch.tensor(int(is_so), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _check(found: list[Layer], layers: Sequence[LayerSpec]) -> None:
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise UnsupportedError("windows of all layers are recorded, and a pipeline stage has some of them; use one stage")
    size = parallel_state.get_tensor_model_parallel_world_size()
    for layer, spec in zip(found, layers, strict=True):
        if is_latent(layer.attention):
            raise UnsupportedError(f"layer {spec.layer_idx} stores a latent (MLA), of which no part is trained")
        if spec.num_kv_heads % size:
            raise UnsupportedError(
                f"layer {spec.layer_idx} has {spec.num_kv_heads} KV heads on {size} tensor-parallel ranks, which share them; windows are "
                f"gathered from ranks that have their own: use at most {spec.num_kv_heads} ranks"
            )
        if layer.attention.config.sequence_parallel:
            raise UnsupportedError("sequence_parallel is on, with which a rank sees parts of a window; record without it")
