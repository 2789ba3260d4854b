"""What clients hear when a request can't be served: OpenAI's layout of errors."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pikv_ds.launch.serving.engine import Busy, Gone


class Refused(Exception):
    """A request that is wrong, or asks for what there is not."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def error_body(message: str, status: int, param: str | None = None) -> dict:
    kinds = {429: "rate_limit_error"} | dict.fromkeys((400, 404, 405, 413, 415), "invalid_request_error")
    return {"error": {"message": message, "type": kinds.get(status, "server_error"), "param": param, "code": status}}


def answer(message: str, status: int, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, status, param), status)


async def on_refused(http: Request, error: Refused) -> JSONResponse:
    return answer(str(error), error.status, error.param)


async def on_busy(http: Request, error: Busy) -> JSONResponse:
    return answer(str(error), 429)


async def on_gone(http: Request, error: Gone) -> JSONResponse:
    return answer(str(error), 503)


async def on_invalid(http: Request, error: RequestValidationError) -> JSONResponse:
    """Names the fields that do not fit."""
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return answer(f"the body is not JSON: {found[0]['ctx']['error']} at character {found[0]['loc'][-1]}", 400)
    if not _says_json(http):
        return answer("the body is read as JSON only with the header content-type: application/json", 415)
    said: dict[str, list[str]] = {}
    for each in found:
        what = "not known here" if each["type"] == "extra_forbidden" else each["msg"].removeprefix("Value error, ")
        said.setdefault(_field(each["loc"]), []).append(what)
    first = str(next((part for part in found[0]["loc"] if part != "body"), "")) or None
    return answer("; ".join(f"{name or 'the body'}: {', or: '.join(dict.fromkeys(all_of))}" for name, all_of in said.items()), 400, first)


def _says_json(http: Request) -> bool:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _field(loc: Sequence[str | int]) -> str:
    """Without the names of the types that were tried, where a field may have several."""
    return ".".join(str(part) for part in loc if part != "body" and not re.fullmatch(r"str|int|.*\[.*", str(part)))


async def on_http(http: Request, error: HTTPException) -> JSONResponse:
    """No such path or method, and a body that can't be read, in the same layout."""
    said = f"{http.method} {http.url.path}: {error.detail}" if error.status_code in (404, 405) else str(error.detail)
    return JSONResponse(error_body(said, error.status_code), error.status_code, headers=error.headers)


async def on_bug(http: Request, error: Exception) -> JSONResponse:
    """Its traceback goes to the log."""
    return answer(f"an error of the service: {type(error).__name__}: {error}", 500)


HANDLERS = {
    Refused: on_refused,
    Busy: on_busy,
    Gone: on_gone,
    RequestValidationError: on_invalid,
    HTTPException: on_http,
    Exception: on_bug,
}
