"""From what a client sent to requests of the engine, and what they say back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import Request as HttpRequest

from pikv_ds.launch.serving.engine import Engine
from pikv_ds.launch.serving.messages import Sampling
from pikv_ds.launch.serving.request import Request, Update
from pikv_ds.launch.serving.text import TextOut

from .errors import Refused
from .schema import ChatRequest, CompletionRequest

_DEFAULT_TOKENS = 16  # OpenAI's


class Intake:
    """Checks lengths and tokens, so that nothing which can't be run reaches a queue."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.runner, self.spec = engine, engine.rank.runner, engine.spec
        self.tokenizer = self.runner.tokenizer
        self.vocabulary = self.runner.vocabulary

    def check(self, asked: CompletionRequest | ChatRequest) -> None:
        if asked.model is not None and asked.model != self.spec.name:
            raise Refused(f"no model {asked.model!r} here; there is {self.spec.name!r}", "model", 404)
        if asked.stream_options is not None and not asked.stream:
            raise Refused("stream_options needs stream: true", "stream_options")
        for stop in asked.stops:
            _check_text(stop, "stop")

    def prompts(self, asked: CompletionRequest) -> list[tuple[str | None, list[int]]]:
        """(text if it was given as one, tokens)."""
        given = asked.prompt
        if isinstance(given, str):
            return [(given, self._ids(given))]
        if given and isinstance(given[0], int):
            return [(None, given)]
        if not given:
            raise Refused("prompt is an empty list", "prompt")
        return [(one, self._ids(one)) if isinstance(one, str) else (None, one) for one in given]

    def _ids(self, text: str) -> list[int]:
        _check_text(text, "prompt")
        return self.tokenizer(text).input_ids

    def chat_prompt(self, asked: ChatRequest) -> list[int]:
        if not self.tokenizer.chat_template:
            raise Refused(
                f"the tokenizer of {self.spec.name} has no chat template; start the service with --chat-template FILE, or use "
                "/v1/completions",
                "messages",
            )
        _check_text(json.dumps(asked.messages, ensure_ascii=False), "messages")
        try:
            return self.tokenizer.apply_chat_template(
                asked.messages, add_generation_prompt=True, tokenize=True, return_dict=False, **asked.chat_template_kwargs or {}
            )
        except Exception as error:  # a template is a program of the model's
            raise Refused(f"the chat template refuses these messages: {type(error).__name__}: {error}", "messages") from error

    def max_tokens(self, asked: CompletionRequest | ChatRequest, prompt: Sequence[int]) -> int:
        limit = self.spec.kv_tokens
        most = self.spec.max_length if limit is None else min(self.spec.max_length, limit)
        room = most - len(prompt)
        wanted = asked.max_tokens
        if isinstance(asked, ChatRequest):
            wanted = asked.max_completion_tokens if asked.max_completion_tokens is not None else wanted
            wanted = room if wanted is None else wanted
        wanted = _DEFAULT_TOKENS if wanted is None else wanted
        if not prompt:
            raise Refused("the prompt has no tokens", "prompt")
        unknown = [token for token in prompt if not 0 <= token < self.vocabulary]
        if unknown:
            raise Refused(f"token {unknown[0]} of the prompt is none of the model's {self.vocabulary}", "prompt")
        biased = [token for token in asked.logit_bias or {} if not 0 <= token < self.vocabulary]
        if biased:
            raise Refused(f"token {biased[0]} of logit_bias is none of the model's {self.vocabulary}", "logit_bias")
        if len(prompt) + wanted > self.spec.max_length:
            raise Refused(
                f"{len(prompt)} tokens of prompt and {wanted} to generate are {len(prompt) + wanted}; at most {self.spec.max_length} fit "
                "(--max-length)",
                "max_tokens",
            )
        if room < 1 and asked.max_tokens != 0:
            raise Refused(
                f"{len(prompt)} tokens of prompt leave no room for an answer; at most {most} fit (--max-length, --kv-tokens)", "messages"
            )
        if limit is not None and len(prompt) + wanted > limit:
            raise Refused(
                f"{len(prompt) + wanted} tokens never fit into the cache, which may hold {limit} per rank (--kv-tokens)", "max_tokens"
            )
        return wanted

    @asynccontextmanager
    async def running(
        self, asked: CompletionRequest | ChatRequest, prompts: Sequence[Sequence[int]], samplings: Sequence[Sequence[Sampling]]
    ) -> AsyncIterator[tuple[list[Request], asyncio.Queue[tuple[int, Update]]]]:
        """Inside, one request per prompt and choice runs; updates come as (index, update). What has not finished then is cancelled."""
        loop, updates = asyncio.get_running_loop(), asyncio.Queue()
        eos = frozenset() if asked.ignore_eos else self.runner.eos
        requests: list[Request] = []
        for prompt, of_prompt in zip(prompts, samplings, strict=True):
            wanted = self.max_tokens(asked, prompt)
            for sampling in of_prompt:
                index = len(requests)

                def tell(update: Update, index: int = index) -> None:
                    try:
                        loop.call_soon_threadsafe(updates.put_nowait, (index, update))
                    except RuntimeError:
                        if not loop.is_closed():  # with the server's end, and nobody reads it any more
                            raise

                out = TextOut(self.tokenizer, prompt, asked.stops)
                requests.append(
                    Request(
                        prompt=list(prompt), max_tokens=max(1, wanted), sampling=sampling, out=out, tell=tell, arrived=time.monotonic(),
                        eos=eos,
                    )
                )  # fmt: skip
        self.engine.submit(requests)
        try:
            yield requests, updates
        finally:
            for request in requests:
                if request.finished is None:
                    self.engine.cancel(request)


def _check_text(text: str, param: str) -> None:
    """JSON can say half a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(f"{param} holds {text[error.start]!r}, half a surrogate pair and no character", param) from error


async def until_gone(http: HttpRequest) -> None:
    """Returns when the client has hung up."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def collect(http: HttpRequest, requests: list[Request], updates: asyncio.Queue) -> list[list[Update]] | None:
    """All updates, by request; None: the client is gone. Raises: Refused with status 503 when the engine fails."""
    collected: list[list[Update]] = [[] for _ in requests]
    left, gone = len(requests), asyncio.ensure_future(until_gone(http))
    try:
        while left:
            following = asyncio.ensure_future(updates.get())
            await asyncio.wait([following, gone], return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                return None
            index, update = following.result()
            if update.error is not None:
                raise Refused(update.error, status=503)
            collected[index].append(update)
            left -= update.finish is not None
    finally:
        gone.cancel()
    return collected
