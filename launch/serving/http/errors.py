"""What clients hear when a request can't be served: OpenAI's layout of errors."""

from __future__ import annotations

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from pikv_ds.launch.serving.engine import Busy, Gone


class Refused(Exception):
    """A request that is wrong, or asks for what there is not."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def error_body(message: str, status: int, param: str | None = None) -> dict:
    kinds = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}
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
    found = [(".".join(str(part) for part in each["loc"] if part != "body"), each["msg"], each["type"]) for each in error.errors()]
    said = "; ".join(f"{name or 'the body'}: {'not known here' if kind == 'extra_forbidden' else what}" for name, what, kind in found)
    return answer(said, 400, found[0][0] or None)


HANDLERS = {Refused: on_refused, Busy: on_busy, Gone: on_gone, RequestValidationError: on_invalid}
