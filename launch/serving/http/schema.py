"""What clients may send, as OpenAI's interface has it. A field that is not known here is refused by name, never ignored."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pikv_ds.launch.serving.messages import Sampling

TOP_LOGPROBS = 20
MOST_CHOICES = 16
_COLDEST = 1e-3  # below it logits / temperature overflow: the most likely token is meant


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"Input should be a number, not {str(value).lower()}")
    return value


Count = Annotated[int, BeforeValidator(_no_bool)]
"""An int; pydantic alone takes true for 1, and logprobs is a number in completions, a boolean in chat."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds have. top_k and ignore_eos are not OpenAI's: the most likely tokens alone; texts do not end by themselves."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: Count | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Count = Field(0, ge=0)
    n: Count = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Count | None = None
    user: str | None = None
    ignore_eos: bool = False

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, choice: int, logprobs: int | None, echo: bool) -> Sampling:
        """Of one of n choices, each of which draws by itself."""
        temperature = 0.0 if self.temperature < _COLDEST else self.temperature
        seed = secrets.randbits(31) if self.seed is None else (self.seed + choice) % 2**63
        return Sampling(
            temperature=temperature, top_p=self.top_p, top_k=self.top_k, seed=seed, logprobs=logprobs, echo=echo,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty, bias=self.logit_bias or {},
        )  # fmt: skip


class CompletionRequest(_Asked):
    prompt: str | list[Count] | list[str] | list[list[Count]]
    best_of: Count | None = None
    echo: bool = False
    logprobs: Count | None = Field(None, ge=0, le=TOP_LOGPROBS)
    suffix: None = None


class ChatRequest(_Asked):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: Count | None = Field(None, ge=0, le=TOP_LOGPROBS)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
