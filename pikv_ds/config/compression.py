"""The "compression" block: a codec, others for keys, values or single layers, and what stays as computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from .block import MethodBlock


class CodecConfig(MethodBlock):
    """A codec: its method, a rotation before it, and as other keys the options of the method, see `pikv methods`."""

    method: str = Field("none", description="Codec, see `pikv methods`.")
    rotate: Literal["none", "hadamard"] = Field("none", description="Rotation of what is stored, before it is rounded to few bits.")
    rotate_seed: int = Field(0, ge=0, lt=1 << 31, description="Chooses the random signs of the rotation.")


class LayerCompressionConfig(CodecConfig):
    """In which format entries of a layer are stored. Other keys are the options of the codec, see `pikv methods`."""

    k: CodecConfig | None = Field(None, description="Another codec for the keys; null = the same.")
    v: CodecConfig | None = Field(None, description="Another codec for the values; null = the same.")

    def parts(self, key: str) -> Iterator[tuple[str, CodecConfig]]:
        """Every codec of the block and its key."""
        yield key, self
        for name in ("k", "v"):
            if getattr(self, name) is not None:
                yield f"{key}.{name}", getattr(self, name)


class CompressionConfig(LayerCompressionConfig):
    """In which format entries are stored. Other keys are the options of the codec, see `pikv methods`."""

    raw_sink_tokens: int | None = Field(None, ge=0, description="First tokens of a request that stay as computed; null = none.")
    raw_recent_tokens: int | None = Field(None, ge=0, description="Latest tokens of a request that stay as computed; null = none.")
    layers: dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]*)$")], LayerCompressionConfig] | None = Field(
        None, description="Layer index -> a block of this kind that holds for that layer in place of this one."
    )

    def parts(self, key: str) -> Iterator[tuple[str, CodecConfig]]:
        yield from super().parts(key)
        for idx, block in (self.layers or {}).items():
            yield from block.parts(f"{key}.layers.{idx}")
