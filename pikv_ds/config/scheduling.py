"""The "scheduling" block: a retention policy and its budgets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from .block import MethodBlock
from .wording import removed

_INSTEAD_OF_TOKEN = (
    "pages leave whole, so 'page' is legal. \"page_size\": 1 keeps the same entries and pads every record to 64 bytes (not for int8, int4 "
    "and int2, whose pages are whole groups); pages of 8 were measured no worse (docs/concepts/eviction.md)"
)


class SchedulingConfig(MethodBlock):
    """Which entries stay. Other keys are the options of the retention policy, see `pikv methods`."""

    method: str = Field("none", description="Retention policy, see `pikv methods`.")
    budget_tokens: int | None = Field(None, ge=1, description="Entries kept per request and full-attention layer.")
    budget_ratio: float | None = Field(None, gt=0, le=1, description="Entries kept, as a share of those appended; 0.25 evicts 4x.")
    budget_bytes: int | None = Field(None, ge=1, description="KV bytes kept per request, over all full-attention layers and ranks.")
    layer_budget: Literal["uniform", "pyramid"] = Field(
        "uniform", description="The same budget for every layer, or more for the first and less for the last (PyramidKV)."
    )
    head_budget: Literal["shared", "uniform", "adaptive"] = Field(
        "shared",
        description="One choice for all KV heads; the same number of entries of each head; or more for heads that need more (Ada-KV).",
    )
    head_floor: float = Field(0.2, ge=0, le=1, description="Share of its uniform budget that an adaptive head has at least.")
    granularity: Literal["page"] = Field("page", description="What leaves together; with page_size 1 a page is one entry.")
    interval: int = Field(1, ge=1, description="Decode steps between two evictions; a prefill chunk is always followed by one.")
    prefill: Literal["auto", "evict", "keep"] = Field(
        "auto",
        description="A prompt in chunks: keep it until its end where its length is known, else as evict; evict after every chunk; or keep "
        "it until the first decode step.",
    )
    sink_tokens: int = Field(4, ge=0, description="First tokens of a request, never evicted; part of the budget.")
    recent_tokens: int = Field(64, ge=0, description="Latest tokens of a request, never evicted; part of the budget.")

    @field_validator("granularity", mode="before")
    @classmethod
    def _check_granularity(cls, value: Any) -> Any:
        if value == "token":
            raise removed("scheduling.granularity", value, _INSTEAD_OF_TOKEN)
        return value
