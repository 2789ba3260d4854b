"""The page at /, as a browser shows it under load. Long form, where there is a Chromium (apt-get install chromium)."""

import re
import shutil
import subprocess
import threading
import time

import httpx
import pytest

from tests.long_form import LONG
from tests.serving.live import engine_of, served, spec_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=4000"]


def browse(*arguments: str, folder) -> str:
    command = [CHROMIUM, *BROWSER, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(not LONG or CHROMIUM is None, reason="long form, with a Chromium")
@pytest.mark.timeout(400)
def test_a_browser_shows_requests_bytes_and_hit_rates(tmp_path):
    with engine_of(spec_of("--max-length", "4000")) as engine, served(engine) as url:
        body = {
            "prompt": ["The history of the castle and of the king who lived in it for many years"] * 3,
            "max_tokens": 3000,
            "ignore_eos": True,
        }
        client = threading.Thread(target=_post, args=(f"{url}/v1/completions", body), daemon=True)
        client.start()
        deadline = time.monotonic() + 60
        while not engine.counts.page or engine.num_running < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2.0)
        shown = browse("--dump-dom", url, folder=tmp_path)
        cells = re.search(r'<tbody id="requests">(.*?)</tbody>', shown, re.S).group(1)
        assert cells.count("<tr>") == 3
        assert "<b>3</b>running" in shown and "rank 0" in shown and "expert 7" in shown
        assert re.search(r"<b>\d+\.\d %</b>prefix hit rate", shown)
        assert re.search(r"rank 0.*?[\d.]+ [KM]iB", shown)
        browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,900", url, folder=tmp_path)
        assert (tmp_path / "page.png").stat().st_size > 10_000


def _post(url: str, body: dict) -> None:
    try:
        httpx.post(url, json=body, timeout=300)
    except httpx.HTTPError:
        return  # the service has stopped meanwhile, as it should
