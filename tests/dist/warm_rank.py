"""A process that has imported what jobs import, and forks a rank for every line on its stdin. Started by warm.py. args: modules...

Requests and replies are JSON, one line each: {"argv", "env", "log"} gives {"pid"}; {"poll": pid} gives {"status"}, null while it runs.
It ends when its stdin does, with every rank that still runs.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import signal
import sys
import threading
import traceback


def serve(requests, replies) -> dict | None:
    """The request to run, in the forked rank; None in this process, at its end."""
    running: set[int] = set()
    while line := requests.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            reply = {"status": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            threads = os.listdir("/proc/self/task")
            assert len(threads) == 1, f"{len(threads)} threads: an import has started some, and a fork has only one of them"
            leads, tell = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.close(leads)
                os.close(tell)
                return request
            os.close(tell)
            os.read(leads, 1)  # until the rank leads its session, so that all of it can be ended
            os.close(leads)
            running.add(pid)
            reply = {"pid": pid}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    return None


def become(request: dict) -> None:
    """Take on what a process of its own would have been started with."""
    log, nothing = os.open(request["log"], os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()


def run() -> None:
    """The job, then what an interpreter does at its end, but for taking its modules apart: that copies every page of them."""
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    requests = os.fdopen(os.dup(0), buffering=1)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no reply
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector of a rank leaves these pages shared
    request = serve(requests, replies)
    if request is not None:
        requests.close()
        replies.close()
        become(request)
        run()


if __name__ == "__main__":
    main()
