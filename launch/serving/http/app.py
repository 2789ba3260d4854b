"""The routes of a service."""

from __future__ import annotations

import time
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from openai.types import Model
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import pikv_ds
from pikv_ds.launch.serving.engine import Engine

from .chat import Chat
from .completions import Completions
from .errors import HANDLERS, Refused
from .intake import Intake
from .schema import ChatRequest, CompletionRequest


def build_app(engine: Engine) -> FastAPI:
    app = FastAPI(title="pikv serve", version=pikv_ds.__version__, openapi_url=None)  # its documents would load scripts from elsewhere
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)
    intake = Intake(engine)
    completions, chat = Completions(intake), Chat(intake)
    model = Model(id=engine.spec.name, created=int(time.time()), object="model", owned_by="pikv-ds").model_dump()
    page = files("pikv_ds.launch.serving.http").joinpath("page.html").read_text(encoding="utf-8")
    engine.counts.watch("pikv_requests_running", "requests with entries in the cache", lambda: engine.num_running)
    engine.counts.watch("pikv_requests_waiting", "requests that wait", lambda: engine.num_waiting)

    @app.post("/v1/completions")
    async def post_completions(asked: CompletionRequest, http: Request) -> Response:
        return await completions.answer(asked, http)

    @app.post("/v1/chat/completions")
    async def post_chat(asked: ChatRequest, http: Request) -> Response:
        return await chat.answer(asked, http)

    @app.get("/v1/models")
    async def get_models() -> dict[str, Any]:
        return {"object": "list", "data": [model | {"max_model_len": engine.spec.max_length}]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        if name != engine.spec.name:
            raise Refused(f"no model {name!r} here; there is {engine.spec.name!r}", "model", 404)
        return model

    @app.get("/health")
    async def get_health() -> Response:
        return JSONResponse({"status": engine.state}, 200 if engine.state == "ok" else 503)

    @app.get("/metrics")
    async def get_metrics() -> Response:
        return Response(generate_latest(engine.counts.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    async def get_status() -> dict[str, Any]:
        return status_of(engine)

    @app.get("/")
    async def get_page() -> Response:
        return HTMLResponse(page)

    return app


def status_of(engine: Engine) -> dict[str, Any]:
    """What the page shows. Bytes are those of the last look, at most a second or so old while there is work."""
    scheduler, counts, spec = engine.scheduler, engine.counts, engine.spec
    return {
        "state": engine.state, "model": spec.name, "backend": spec.backend, "ranks": spec.ranks, "schedule": spec.schedule,
        "running": engine.num_running, "waiting": engine.num_waiting, "finished": counts.finished,
        "requests": [
            {
                "number": request.number, "rank": request.rank, "prompt": len(request.prompt), "stored": request.stored,
                "reused": request.reused, "generated": len(request.tokens), "most": request.max_tokens,
            }
            for request in list(scheduler.running)
        ],
        "ttft_ms": spec.ttft_ms, "tbt_ms": spec.tbt_ms, "ttft_met": counts.attainment("ttft"), "tbt_met": counts.attainment("tbt"),
        "prefix_hit_rate": scheduler.found / scheduler.looked_up if scheduler.looked_up and engine.prefixes is not None else None,
        "decode_ms": scheduler.pace.decode_ms, "prompt_token_ms": scheduler.pace.token_ms,
        **counts.page,
    }  # fmt: skip
