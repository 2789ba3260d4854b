"""/v1/completions, whole or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs

from pikv_ds.launch.serving.messages import Logprob
from pikv_ds.launch.serving.request import Request, Update

from .errors import Refused, error_body
from .intake import Intake, collect
from .schema import CompletionRequest
from .sse import DONE, Stream, event


class Completions:
    def __init__(self, intake: Intake) -> None:
        self.intake, self.tokenizer, self.name = intake, intake.tokenizer, intake.spec.name

    async def answer(self, asked: CompletionRequest, http: HttpRequest) -> Response:
        self.intake.check(asked)
        if asked.best_of not in (None, asked.n):
            raise Refused(f"best_of {asked.best_of} with n {asked.n}: choices are not ranked here; leave best_of out", "best_of")
        if asked.max_tokens == 0 and not asked.echo:
            raise Refused("max_tokens 0 without echo asks for nothing", "max_tokens")
        prompts = self.intake.prompts(asked)
        for _, prompt in prompts:  # before a stream has begun
            self.intake.max_tokens(asked, prompt)
        reply = _Reply(self, asked, prompts)
        samplings = [[asked.sampling(choice, asked.logprobs, asked.echo) for choice in range(asked.n)] for _ in prompts]
        running = self.intake.running(asked, [prompt for _, prompt in prompts], samplings)
        if asked.stream:
            entered = await running.__aenter__()  # what it refuses is an answer of its own, not part of a stream
            return Stream(reply.stream(*entered), running)
        async with running as (requests, updates):
            collected = await collect(http, requests, updates)
        return Response(status_code=499) if collected is None else JSONResponse(reply.whole(requests, collected))


class _Reply:
    """To one client's request."""

    def __init__(self, completions: Completions, asked: CompletionRequest, prompts: list[tuple[str | None, list[int]]]) -> None:
        self.tokenizer, self.asked, self.prompts = completions.tokenizer, asked, prompts
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": completions.name, "object": "text_completion"}
        self._told = [0] * (len(prompts) * asked.n)
        """Characters of token strings that each choice has been told, for text_offset."""

    def whole(self, requests: list[Request], collected: list[list[Update]]) -> dict[str, Any]:
        choices = []
        for index, updates in enumerate(collected):
            first = [*self._echo(index, updates)]
            choices.append(self._choice(index, first + [update for update in updates if update.tokens]))
        return _plain(Completion.construct(**self.head, choices=choices, usage=self._usage(requests)))

    async def stream(self, requests: list[Request], updates: Any) -> AsyncIterator[str]:
        left, failed = len(requests), False
        waiting: list[list[Update]] = [[] for _ in requests]
        while left and not failed:
            index, update = await updates.get()
            failed = update.error is not None
            if failed:
                yield event(error_body(update.error, 503))
                continue
            if not update.tokens:  # log-probabilities of the prompt come before its first token
                waiting[index].append(update)
                continue
            told = [update]
            if self.asked.echo and len(requests[index].tokens) and not self._echoed(index):
                told = [*self._echo(index, waiting[index]), update]
            left -= update.finish is not None
            yield event(_plain(Completion.construct(**self.head, choices=[self._choice(index, told)])))
        if self.asked.includes_usage and not failed:
            yield event(_plain(Completion.construct(**self.head, choices=[], usage=self._usage(requests))))
        yield DONE

    def _echoed(self, index: int) -> bool:
        return bool(self._told[index])

    def _echo(self, index: int, updates: Sequence[Update]) -> list[Update]:
        """The prompt as an update of its own, if it is asked for."""
        if not self.asked.echo:
            return []
        text, prompt = self.prompts[index // self.asked.n]
        text = self.tokenizer.decode(prompt) if text is None else text
        if self.asked.logprobs is None:
            self._told[index] = 1
            return [Update(text, prompt, [], [])]
        first = Logprob(prompt[0], None, [])  # nothing comes before it
        return [Update(text, prompt, [first, *(each for update in updates for each in update.prompt_logprobs)], [])]

    def _choice(self, index: int, updates: Sequence[Update]) -> CompletionChoice:
        if self.asked.max_tokens == 0:  # one token has been run to get at the prompt's logits
            updates = [update._replace(finish="length") for update in updates[:1]]
        logprobs = [each for update in updates for each in update.logprobs]
        return CompletionChoice.construct(
            index=index,
            text="".join(update.text for update in updates),
            finish_reason=updates[-1].finish,
            logprobs=None if self.asked.logprobs is None else self._logprobs(index, logprobs),
        )

    def _logprobs(self, index: int, logprobs: list[Logprob]) -> Logprobs:
        tokens, offsets, tops = [], [], []
        for each in logprobs:
            tokens.append(self.tokenizer.decode([each.token]))
            offsets.append(self._told[index])
            self._told[index] += len(tokens[-1])
            top: dict[str, float] = {}
            for token, logprob in [*each.top, *([] if each.logprob is None else [(each.token, each.logprob)])]:
                name = self.tokenizer.decode([token])
                top[name] = max(logprob, top.get(name, logprob))  # several tokens may read alike
            tops.append(top if each.logprob is not None else None)
        return Logprobs.construct(tokens=tokens, token_logprobs=[each.logprob for each in logprobs], top_logprobs=tops, text_offset=offsets)

    def _usage(self, requests: list[Request]) -> CompletionUsage:
        given = sum(len(prompt) for _, prompt in self.prompts)
        made = 0 if self.asked.max_tokens == 0 else sum(len(request.tokens) for request in requests)
        cached = sum(request.reused for request in requests)
        return CompletionUsage.construct(
            prompt_tokens=given, completion_tokens=made, total_tokens=given + made, prompt_tokens_details={"cached_tokens": cached}
        )


def _plain(answer: Completion) -> dict[str, Any]:
    """The first token of an echoed prompt has no log-probability, for which OpenAI's own types have no place: not checked again."""
    return answer.model_dump(mode="json", warnings=False)
