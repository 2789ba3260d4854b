"""The expansion of a latent layer (MLA) as its model computes it now: kv_b_proj, with adapters, quantisation and hooks around it.

B rows, T columns, H heads, R width of the latent, D and Dv of the unrotated part of a key and of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import in_step

from .projection import is_plain, linear_map
from .running import Running

_NEEDED = ("kv_b_proj", "num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
_COMPARED = 8  # tokens of each row whose expansion is compared


class Expansion:
    """Of one attention module. A plain kv_b_proj is read, so that changes in place hold from the next forward on. Any other is called once
    more in every forward, on R unit vectors, and what the model made of its own tokens is compared with the map that this gave."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._plain = False  # it was read in the forward before, and compared

    def maps(self, module: nn.Module, running: Running, latent: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """up_k [H, D, R] and up_v [H, Dv, R] for the forward that runs, in whose graph they are.

        Args: latent [B, T, 1, R + D_rot], what is stored; key [B, H, T, D + D_rot] and value [B, H, T, Dv], what the model expanded it to.

        Raises: UnsupportedError for a module of another shape, or that can't be called. What computes something else than the map is told
            at the end of the forward, as that reads the device: Running.check_expansions.
        """
        projection = getattr(module, "kv_b_proj", None)
        if projection is not None and is_plain(projection):
            if self._plain:
                return _split(module, projection.weight)
            self._check_shape(module, key, value)
            found, self._plain = _split(module, projection.weight), True
        else:
            self._plain = False
            self._check_shape(module, key, value)
            found = _split(module, linear_map(projection, module.kv_lora_rank, latent.dtype, latent.device).T)
        running.expansions.append((self.layer, type(module).__name__, _deviates(found, latent, key, value)))
        return found

    def _check_shape(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        name = f"layer {self.layer} ({type(module).__name__})"
        missing = [each for each in _NEEDED if not hasattr(module, each)]
        if missing:
            raise UnsupportedError(
                f"{name} stores a latent but has no {', '.join(missing)}; PiKV absorbs attention as in DeepSeek-V2/V3 only: a kv_b_proj "
                "that makes the keys and values of all heads"
            )
        got, expected = (
            (key.shape[1], key.shape[-1], value.shape[-1]),
            (module.num_heads, module.qk_nope_head_dim + module.qk_rope_head_dim, module.v_head_dim),
        )
        if got != expected:
            raise UnsupportedError(f"{name} expands its latent to (heads, key, value) = {got}, its own numbers say {expected}")


def _split(module: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[H * (D + Dv), R] as [H, D, R] (keys) and [H, Dv, R] (values)."""
    per_head = weight.reshape(module.num_heads, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)
    return per_head.split([module.qk_nope_head_dim, module.v_head_dim], 1)


@in_step
def _deviates(maps: tuple[Tensor, Tensor], latent: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Bool [], on the device: the model made something else of the latent than the maps do."""
    step = max(1, latent.shape[1] // _COMPARED)
    up_k, up_v = (up.float() for up in maps)
    c, k_rot = latent[:, ::step, 0].float().tensor_split([up_k.shape[-1]], -1)
    expected_k = torch.einsum("btr,hdr->bhtd", c, up_k)
    expected_k = torch.cat([expected_k, k_rot.unsqueeze(1).expand(-1, expected_k.shape[1], -1, -1)], -1)
    expected_v = torch.einsum("btr,hvr->bhtv", c, up_v)
    wrong = [
        (own[:, :, ::step].float() - expected).abs().amax() > rounding(own.dtype) * expected.abs().amax()
        for own, expected in ((key, expected_k), (value, expected_v))
    ]
    return wrong[0] | wrong[1]


def rounding(dtype: torch.dtype) -> float:
    """How far two ways to compute a projection may lie apart, relative to the largest number."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 8 * 2.0**-10  # TF32
    return max(4 * torch.finfo(dtype).eps, 2e-5)
