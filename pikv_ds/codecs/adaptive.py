import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec
from pikv_ds.ops.format.formats import PageFormat
from pikv_ds.spec import LayerSpec


@CODECS.register("adaptive")
class Adaptive(Codec):
    """A light codec for the entries that get the most attention, a heavy one for the rest (the authors' unified compressor).

    New entries are stored by `light`. Full pages that are no sinks and not recent (raw_sink_tokens, raw_recent_tokens) are encoded again by
    `heavy`, those with the least attention so far first, until at most light_ratio of the request is left light; they never come back.
    Source: PiKV, arXiv 2508.06526, section 3.3; which entries are important is left open there: policies/h2o.py.
    Bytes per token and layer: those of light times the share that is light, those of heavy times the rest, and 4 bytes per page.
    """

    def __init__(self, *, light: str = "int8", heavy: str = "int4", light_ratio: float = 0.25, rope_raw: bool | None = None) -> None:
        if not 0 <= light_ratio <= 1:
            raise ValueError(f"light_ratio from 0 to 1, got {light_ratio}")
        for option, name in (("light", light), ("heavy", heavy)):
            if name == self.name or name not in CODECS.names():
                legal = ", ".join(repr(other) for other in CODECS.names() if other != self.name)
                raise ValueError(f"{option} = one of {legal}, got {name!r}")
            if CODECS.get(name).calibrated or CODECS.get(name).per_request:
                raise ValueError(f"{option} = a record format such as 'int8', got {name!r}: its coefficients are of another width")
        self.light, self.heavy, self.light_ratio, self.rope_raw = CODECS.build(light), CODECS.build(heavy), light_ratio, rope_raw
        lossy = [codec for codec in (self.light, self.heavy) if not codec.lossless]
        if rope_raw and not lossy:
            raise ValueError(f"rope_raw = null or false: {light!r} and {heavy!r} keep all columns as computed")
        for codec in lossy:
            codec.rope_raw = rope_raw
        self.group = max(self.light.group, self.heavy.group)

    @property
    def preferred_page_size(self) -> int:
        return max(self.light.preferred_page_size, self.heavy.preferred_page_size)

    def format_name(self, dtype: torch.dtype) -> str:
        return self.heavy.format_name(dtype)

    def page_format(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PageFormat:
        return self.heavy.page_format(spec, page_size, dtype)
