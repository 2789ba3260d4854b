"""Which implementation serves: loaded once, and nobody runs another meanwhile."""

import threading
from dataclasses import replace

from pikv_ds.ops.build import load


def test_threads_wait_for_the_one_that_loads(monkeypatch):
    """All get the same answer: before, one that came while another thread loaded was served by plain torch."""
    load.ensured("cpu")
    monkeypatch.delenv("PIKV_OPS", raising=False)
    entered, go = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        assert go.wait(30)
        assert not load.ensure("cpu"), "the thread that loads must not wait for itself"

    monkeypatch.setitem(load.BACKENDS, "cpu", replace(load.BACKENDS["cpu"], load=slow))
    monkeypatch.setattr(load, "_loaded", {})
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(load.ensured("cpu"))) for _ in range(3)]
    threads[0].start()
    assert entered.wait(30)
    for each in threads[1:]:
        each.start()
    go.set()
    for each in threads:
        each.join(30)
    assert found == ["cpu"] * 3
