"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class Stream(StreamingResponse):
    """Leaves `running` when it ends, also where the client has hung up before its first event was asked for."""

    def __init__(self, events: Any, running: AbstractAsyncContextManager) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.running.__aexit__(None, None, None)
