"""The models that lm-eval sees: its own HFLM, with forwards and generations that go through a backend's cache.

Tokens, templates, truncation, batches, stop strings and what is cut off are lm-eval's code; only _model_call and _model_generate are ours.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pikv_ds.errors import ConfigError, UnsupportedError

from .job import backend_class, start_distributed
from .model_args import run_of
from .prefixes import PrefixRun, shares_prefixes
from .scoring import Continuations

OF_HFLM = (
    "tokenizer", "use_fast_tokenizer", "truncation", "logits_cache", "softmax_dtype", "add_bos_token", "prefix_token_id",
    "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip


@functools.cache
def cache_lm(base: type, host: str) -> type:
    """base: lm_eval.models.huggingface.HFLM, which is not there to be imported everywhere; host: a backend's name."""

    class CacheLM(base):
        """Every rank is rank 0 of 1 to lm-eval, as under tensor parallelism: all run the same requests, the first one reports.

        Args: pretrained: model folder, None = the bundled model. dense: the host's own cache. max_length: tokens of a sequence, None = as
            lm-eval finds it. batch_size, max_batch_size, device and those of OF_HFLM: as HFLM takes them. The others: see run_of.

        Raises: ConfigError, UnsupportedError, FileNotFoundError with the argument, what is legal and what to do.
        """

        def __init__(
            self,
            pretrained: str | None = None,
            *,
            dense: bool = False,
            max_length: int | None = None,
            batch_size: int | str | None = 1,
            max_batch_size: int | None = 64,
            device: str | None = None,
            **options: Any,
        ) -> None:
            own = {name: options.pop(name) for name in OF_HFLM if name in options}
            spec, block = run_of(host, pretrained, max_length, options, also=OF_HFLM)
            if str(batch_size).startswith("auto") and spec.ranks > 1:
                raise UnsupportedError(
                    f"batch_size = {batch_size!r} on {spec.ranks} ranks: one rank may run out of memory where another does not, and "
                    "they would not agree on a size; give a number"
                )
            with torch.random.fork_rng():  # lm-eval has seeded it, and its own model draws nothing while it is loaded
                if (spec.ranks > 1 or host == "megatron") and not dist.is_initialized():
                    start_distributed()
                self.cache_backend = backend_class(host)(spec, 300)
                own.setdefault("tokenizer", spec.model)
                model = self.cache_backend.causal_lm
                if device is not None and torch.device(device).type != model.device.type:
                    raise ConfigError(f"device = {device!r}: the model is on {model.device.type}; leave device out")
                super().__init__(
                    model, backend="causal", max_length=max_length, batch_size=batch_size or 1, max_batch_size=max_batch_size, **own
                )
            self.pretrained = spec.model
            self.block, self.chunk = None if dense else block, spec.chunk
            self.prefixes = None
            if shares_prefixes(self.block) and host == "hf":
                self.prefixes = PrefixRun(self.cache_backend, self.block)
            self._continuations = Continuations()

        def _loglikelihood_tokens(self, requests: list, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            self._continuations = Continuations(requests, self.max_length)
            try:
                return super()._loglikelihood_tokens(requests, *args, **kwargs)
            finally:
                self._continuations = Continuations()

        @torch.no_grad()
        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            """inps [B, T] int64 -> logits [B, T, V] in the model's dtype, in which lm-eval's own model takes the softmax too."""
            if self.prefixes is not None:
                return self.prefixes.score(inps, self._continuations, self.chunk).to(self.model.dtype)
            widths = self._continuations.forwards(inps, self.chunk)
            with self.cache_backend.session(self.block, *inps.shape) as session:
                logits = torch.cat([session.feed(part) for part in inps.split(widths, 1)], 1)
            return logits.to(self.model.dtype)

        @torch.no_grad()
        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            """context [B, T] int64, padded on the left; prompts are fed in chunks, so that what follows a chunk reads it from the store."""
            options.setdefault("prefill_chunk_size", self.chunk)
            opened = self.cache_backend.generation(self.block, options["attention_mask"], max_length)
            with opened if self.prefixes is None else self.prefixes.generation() as cache:
                return super()._model_generate(context, max_length, stop, **options, **cache)

    return CacheLM
