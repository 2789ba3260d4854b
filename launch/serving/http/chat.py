"""/v1/chat/completions, whole or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from pikv_ds.launch.serving.messages import Logprob
from pikv_ds.launch.serving.request import Request, Update
from pikv_ds.launch.serving.text import bytes_of

from .errors import Refused, error_body
from .intake import Intake, collect
from .schema import ChatRequest
from .sse import DONE, Stream, event


class Chat:
    def __init__(self, intake: Intake) -> None:
        self.intake, self.tokenizer, self.name = intake, intake.tokenizer, intake.spec.name

    async def answer(self, asked: ChatRequest, http: HttpRequest) -> Response:
        self.intake.check(asked)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
        prompt = self.intake.chat_prompt(asked)
        if self.intake.max_tokens(asked, prompt) < 1:
            raise Refused("max_tokens 0 asks for nothing", "max_tokens")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        running = self.intake.running(asked, [prompt], [[asked.sampling(choice, logprobs, False) for choice in range(asked.n)]])
        reply = _Reply(self, asked, len(prompt))
        if asked.stream:
            entered = await running.__aenter__()
            return Stream(reply.stream(*entered), running)
        async with running as (requests, updates):
            collected = await collect(http, requests, updates)
        return Response(status_code=499) if collected is None else JSONResponse(reply.whole(requests, collected))


class _Reply:
    def __init__(self, chat: Chat, asked: ChatRequest, prompt_tokens: int) -> None:
        self.tokenizer, self.asked, self.prompt_tokens = chat.tokenizer, asked, prompt_tokens
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.name}

    def whole(self, requests: list[Request], collected: list[list[Update]]) -> dict[str, Any]:
        choices = [
            Choice(
                index=index,
                finish_reason=updates[-1].finish,
                message=ChatCompletionMessage(role="assistant", content="".join(update.text for update in updates)),
                logprobs=self._logprobs(ChoiceLogprobs, updates),
            )
            for index, updates in enumerate(collected)
        ]
        return ChatCompletion(**self.head, object="chat.completion", choices=choices, usage=self._usage(requests)).model_dump(mode="json")

    async def stream(self, requests: list[Request], updates: Any) -> AsyncIterator[str]:
        left = len(requests)
        for index in range(left):
            yield self._chunk([ChunkChoice(index=index, delta=ChoiceDelta(role="assistant", content=""))])
        while left:
            index, update = await updates.get()
            if update.error is not None:
                yield event(error_body(update.error, 503))
                break
            left -= update.finish is not None
            choice = ChunkChoice(index=index, delta=ChoiceDelta(content=update.text), finish_reason=update.finish)
            choice.logprobs = self._logprobs(ChunkLogprobs, [update])
            yield self._chunk([choice])
        if self.asked.includes_usage and not left:
            yield self._chunk([], self._usage(requests))
        yield DONE

    def _chunk(self, choices: list[ChunkChoice], usage: CompletionUsage | None = None) -> str:
        return event(ChatCompletionChunk(**self.head, object="chat.completion.chunk", choices=choices, usage=usage).model_dump(mode="json"))

    def _logprobs(self, kind: type, updates: Sequence[Update]) -> Any:
        if not self.asked.logprobs:
            return None
        return kind(content=[self._token(each) for update in updates for each in update.logprobs])

    def _token(self, each: Logprob) -> ChatCompletionTokenLogprob:
        top = [TopLogprob(**self._named(token), logprob=logprob) for token, logprob in each.top]
        return ChatCompletionTokenLogprob(**self._named(each.token), logprob=each.logprob, top_logprobs=top)

    def _named(self, token: int) -> dict[str, Any]:
        return {"token": self.tokenizer.decode([token]), "bytes": bytes_of(self.tokenizer, token)}

    def _usage(self, requests: list[Request]) -> CompletionUsage:
        made = sum(len(request.tokens) for request in requests)
        return CompletionUsage(prompt_tokens=self.prompt_tokens, completion_tokens=made, total_tokens=self.prompt_tokens + made)
