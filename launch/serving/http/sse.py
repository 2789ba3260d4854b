"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import json
from typing import Any

DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
