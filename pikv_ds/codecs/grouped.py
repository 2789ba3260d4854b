"""What int8, int4 and int2 share: K scales per channel over a group of tokens."""

from __future__ import annotations

import torch

from pikv_ds.codecs.base import Codec
from pikv_ds.ops.format.checks import MIN_GROUP
from pikv_ds.ops.format.formats import FORMATS, GROUP


class GroupedIntegers(Codec):
    """Unsigned codes with a scale and a zero: value = code * scale + zero."""

    def __init__(self, *, group: int = GROUP, rope_raw: bool | None = None) -> None:
        if group < MIN_GROUP or group > 256 or group % 16:
            raise ValueError(f"a multiple of 16 from {MIN_GROUP} to 256: at {MIN_GROUP} tokens the K scales cost 1 bit per element")
        self.group, self.rope_raw = group, rope_raw

    @property
    def preferred_page_size(self) -> int:
        return max(self.group, FORMATS[self.name].preferred_page_size)

    def format_name(self, dtype: torch.dtype) -> str:
        return self.name
