"""A service from its first rank's start to its end: load, serve, finish what runs, stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn

from pikv_ds.errors import ConfigError

from .control import Control
from .engine import Engine
from .http.app import build_app
from .load import load
from .rank import Rank
from .spec import ServeSpec
from .start import Ranks, ranks_of

GRACE_S = 120.0  # that running requests have to finish once the service was told to stop


def serve(spec: ServeSpec, host: str, port: int) -> int:
    """Until SIGTERM or SIGINT, or until a rank fails. Returns an exit status. Raises: RankEnded, ConfigError, and what loading refuses."""
    torch.set_num_threads(spec.threads)
    with _listener(host, port) as listener, ranks_of(spec) as ranks:
        rank = Rank(load(spec))
        if spec.chat_template is not None:
            rank.runner.tokenizer.chat_template = spec.chat_template
        engine = Engine(spec, rank, Control(spec.timeout_s), _watch(ranks))
        try:
            return _run(engine, listener)
        finally:
            rank.runner.close()


def _watch(ranks: Ranks | None):
    return (lambda: None) if ranks is None else ranks.check


def _listener(host: str, port: int) -> socket.socket:
    """Bound before anything is loaded. It listens once the service is ready."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; give another, or --port 0 for any that is free") from error
    return listener


def _run(engine: Engine, listener: socket.socket) -> int:
    config = uvicorn.Config(build_app(engine), log_level="warning", lifespan="off", timeout_graceful_shutdown=int(GRACE_S))
    server = _Server(config, engine)

    def loop() -> None:
        torch.set_num_threads(engine.spec.threads)  # OpenMP keeps it per thread
        try:
            engine.run()
        finally:
            server.should_exit = True

    thread = threading.Thread(target=loop, name="engine")
    thread.start()
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        engine.stop()
        thread.join()
    if engine.failed is not None:
        print(f"pikv serve: the service has failed, and all requests were told: {engine.failed}", file=sys.stderr, flush=True)
        return 1
    print(f"stopped; {engine.counts.finished} requests were answered, {server.cut_off} were cut off", flush=True)
    return 0


class _Server(uvicorn.Server):
    """Says where it listens; a signal lets running requests finish, a second one does not."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine
        self.cut_off = 0

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        spec, why = self.engine.spec, self.engine.rank.runner.shares_prefixes
        print(f"serving {spec.name} on {spec.ranks} rank(s), backend {spec.backend}, schedule {spec.schedule}", flush=True)
        if self.engine.prefixes is None:
            print(f"prompts that begin alike are each run as a whole: {why or '--prefix-rows 0'}", flush=True)
        print(f"ready: http://{where}:{port}", flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        await super().shutdown(sockets)
        self.cut_off = self.engine.num_running + self.engine.num_waiting

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn, but the process goes on after it and ends by itself."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._told, each)
        try:
            yield
        finally:
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(each)

    def _told(self, which: signal.Signals) -> None:
        running, waiting = self.engine.num_running, self.engine.num_waiting
        if self.should_exit:
            print(f"{which.name} again: {running + waiting} requests are cut off", flush=True)
            self.force_exit = True
            return
        print(f"{which.name}: finishing {running} running and {waiting} waiting requests; no others are taken", flush=True)
        self.engine.drain()
        self.should_exit = True
