"""What `pikv plan` knows of a model and a configuration before anything is allocated."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pikv_ds.errors import ConfigError

if TYPE_CHECKING:
    from pikv_ds.codecs.table import CodecTable
    from pikv_ds.spec import LayerSpec

DTYPES = ("float32", "bfloat16", "float16")
ASSUMED = "bfloat16"  # of a configuration that names none: what models of this size are published in


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    layers: list[LayerSpec]
    text: Any
    """The host's configuration of the decoder."""
    codec: CodecTable
    dtype: str
    dtype_assumed: bool
    page_size: int


def read(args: argparse.Namespace) -> PlannedModel:
    """From --model, --codec, --page-size and --dtype. Raises: ConfigError."""
    from pikv_ds.adapters.hf.model_spec import load_model_config, read_model_spec
    from pikv_ds.blueprint.methods import codec_of
    from pikv_ds.bundled import model_path
    from pikv_ds.config.pikv import PiKVConfig

    config = PiKVConfig(page_size=args.page_size, compression=_compression(args.codec))
    model = load_model_config(args.model or model_path())
    text = model.get_text_config(decoder=True)
    of_model = getattr(model, "dtype", None) or getattr(text, "dtype", None)
    assumed = of_model is None and args.dtype is None
    dtype = args.dtype or (ASSUMED if assumed else str(of_model).removeprefix("torch."))
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is not given and the model's configuration says {dtype!r}; legal: {', '.join(DTYPES)}")
    return PlannedModel(
        layers=read_model_spec(model), text=text, codec=codec_of(config.compression), dtype=dtype, dtype_assumed=assumed,
        page_size=config.resolve_page_size(),
    )  # fmt: skip


def _compression(given: str) -> dict[str, Any]:
    """The "compression" block of --codec: a name, or the block as JSON."""
    if not given.lstrip().startswith("{"):
        return {"method": given}
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--codec {given!r} is not JSON: {error}; quote it") from None
