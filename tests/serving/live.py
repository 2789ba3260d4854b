"""A service to test against: in this process for what does not need processes of its own, or as a user starts it."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from pikv_ds.bundled import model_path
from pikv_ds.launch.cli import build_parser
from pikv_ds.launch.commands.serve import read_spec
from pikv_ds.launch.ranks import end_group
from pikv_ds.launch.serving.control import Control
from pikv_ds.launch.serving.engine import Engine
from pikv_ds.launch.serving.http.app import build_app
from pikv_ds.launch.serving.load import load
from pikv_ds.launch.serving.rank import Rank
from pikv_ds.launch.serving.spec import ServeSpec

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def spec_of(*arguments: str, **changes) -> ServeSpec:
    """That of `pikv serve` with these arguments, changed."""
    return replace(read_spec(build_parser().parse_args(["serve", *arguments])), **changes)


@contextlib.contextmanager
def engine_of(spec: ServeSpec) -> Iterator[Engine]:
    """Rank 0's, running in a thread; other ranks follow where torch.distributed has some."""
    rank = Rank(load(spec))
    rank.runner.tokenizer.chat_template = spec.chat_template
    engine = Engine(spec, rank, Control(spec.timeout_s), lambda: None)

    def run() -> None:
        torch.set_num_threads(spec.threads)
        engine.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        engine.stop()
        thread.join(60)
        rank.runner.close()
    assert not thread.is_alive()


@contextlib.contextmanager
def served(engine: Engine, app: FastAPI | None = None) -> Iterator[str]:
    """The URL of an engine's HTTP side, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app or build_app(engine), port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)


@dataclass
class Started:
    """A `pikv serve` process."""

    process: subprocess.Popen
    log: Path
    url: str = ""

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def children(self) -> list[int]:
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]


@contextlib.contextmanager
def started(folder: Path, *arguments: str, ready_s: float = 240) -> Iterator[Started]:
    log = folder / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "pikv_ds.launch.cli", "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        service = Started(process, log)
        try:
            deadline = time.monotonic() + ready_s
            while "ready: " not in service.said:
                assert process.poll() is None and time.monotonic() < deadline, service.said
                time.sleep(0.1)
            service.url = service.said.partition("ready: ")[2].split()[0]
            yield service
        finally:
            end_group(process)


BUNDLED = str(model_path())
