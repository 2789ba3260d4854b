"""Services over several ranks, and as processes that a user starts and stops. Short: two ranks in one load; long: the rest."""

import json
import os
import shutil
import signal
import sys
import time

import httpx
import openai
import pytest

from pikv_ds.launch.cli import main
from tests.dist.launcher import run_commands, run_gloo
from tests.long_form import LONG
from tests.serving.live import BUNDLED, CHAT_TEMPLATE, started

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
long_form = pytest.mark.skipif(not LONG, reason="long form: processes of their own")
LAYOUTS = {
    "hf": (2, ""),
    "hf, three ranks": (3, ""),
    "megatron": (2, "--backend megatron"),
    "megatron, tensor parallel": (4, "--backend megatron --tp 2"),
    "experts sharded": (2, "--ep 2"),
}


@pytest.mark.parametrize("name", LAYOUTS if LONG else ["hf"])
def test_load_over_ranks_loses_nothing_and_nothing_is_wrong(name):
    ranks, arguments = LAYOUTS[name]
    options = {"env": {"PIKV_SERVE_ARGUMENTS": arguments}} if arguments else {}
    result = run_gloo("serving.py", ranks=ranks, timeout_s=400, **options)
    rows = result.check("load")
    assert rows[0]["requests"] == 12


@long_form
def test_sigterm_finishes_what_runs_and_says_so(tmp_path):
    with started(tmp_path, "--ranks", "2", "--max-length", "400") as service, httpx.Client(timeout=120) as client:
        children = service.children()
        body = {"prompt": "The", "max_tokens": 120, "temperature": 0, "ignore_eos": True, "stream": True}
        with client.stream("POST", f"{service.url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            service.terminate()
            told = [line for line in lines if line.startswith("data: {")]
        assert json.loads(told[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length" and len(told) >= 119
        assert service.process.wait(60) == 0
        assert "SIGTERM: finishing 1 running and 0 waiting requests" in service.said
        assert "stopped; 1 requests were answered, 0 were cut off" in service.said
        assert not [pid for pid in children if _alive(pid)]


@long_form
def test_a_second_signal_cuts_off_what_runs(tmp_path):
    with started(tmp_path, "--max-length", "4000") as service:
        body = {"prompt": "The", "max_tokens": 3900, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()  # whoever drops it hangs up
            next(lines)
            service.terminate()
            while "SIGTERM: finishing 1 running" not in service.said:
                time.sleep(0.05)
            service.terminate()
            assert service.process.wait(60) == 0, service.said
        assert "SIGTERM again: 1 requests are cut off" in service.said and "1 were cut off" in service.said


@long_form
def test_two_services_on_one_machine(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    body = {"prompt": "The history of", "max_tokens": 8, "temperature": 0}
    with started(folders[0], "--ranks", "2") as one, started(folders[1], "--ranks", "2") as other:
        texts = [httpx.post(f"{each.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"] for each in (one, other)]
        assert texts[0] == texts[1] and one.url != other.url
        other.terminate()
        assert other.process.wait(60) == 0
        assert httpx.get(f"{one.url}/health").json() == {"status": "ok"}


@long_form
@pytest.mark.parametrize("busy", [True, False])
def test_a_rank_that_dies_ends_the_service_with_an_error(tmp_path, busy):
    with started(tmp_path, "--ranks", "2", "--max-length", "4000") as service:
        (child,) = service.children()
        if busy:
            body = {"prompt": "The", "max_tokens": 3000, "temperature": 0, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                os.kill(child, signal.SIGKILL)
                told = [line for line in lines if "error" in line]
            assert told and "rank 1 has ended with status -9" in told[0]
        else:
            os.kill(child, signal.SIGKILL)
        assert service.process.wait(60) == 1
        assert "the service has failed" in service.said and "rank 1 has ended with status -9" in service.said


@long_form
def test_ranks_do_not_outlive_the_first(tmp_path):
    with started(tmp_path, "--ranks", "2") as service:
        (child,) = service.children()
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait(10)
        deadline = time.monotonic() + 30
        while _alive(child):
            assert time.monotonic() < deadline, "rank 1 goes on without rank 0"
            time.sleep(0.1)


@long_form
@pytest.mark.parametrize("ranks", [1, 2])
def test_lm_eval_local_completions(tmp_path, ranks):
    """The numbers of lm-eval's own `hf` model, asked over HTTP."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [("In the year 1998 the", " river was"), ("It is", " a good day for the king"), ("The castle of", " stone")]
    scored = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    until = {"until": ["."], "max_gen_toks": 10, "do_sample": False, "temperature": 0.0}
    written = [Instance("generate_until", {}, (context, until), i) for i, (context, _) in enumerate(pairs)]
    own = HFLM(pretrained=BUNDLED, device="cpu", dtype="float32", batch_size=1)
    with started(tmp_path, "--ranks", str(ranks)) as service:
        address = f"{service.url}/v1/completions"
        asked = LocalCompletionsAPI(base_url=address, model="bundled", tokenizer=BUNDLED, num_concurrent=3, batch_size=2, max_length=512)
        found, expected = asked.loglikelihood(scored), own.loglikelihood(scored)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert asked.generate_until(written) == own.generate_until(written)


@long_form
def test_a_chat_template_from_a_file_and_what_is_refused_before_ranks_start(tmp_path, capsys):
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    with started(tmp_path, "--chat-template", str(template)) as service:
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
            answer = client.chat.completions.create(model="bundled", messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
            assert answer.choices[0].message.content is not None
        taken = service.url.rpartition(":")[2]
        second = run_commands([[sys.executable, "-m", "pikv_ds.launch.cli", "serve", "--port", taken]], ranks=1, timeout_s=120)
        assert second.returncode == 2 and f"--port {taken}: Address already in use" in second.output, second.describe()


def test_mistakes_are_told_before_anything_starts(capsys, tmp_path):
    no_weights = tmp_path / "model"
    shutil.copytree(BUNDLED, no_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    for arguments, said in (
        (["--max-length", "9000"], "--max-length 9000: the model has 4096 positions"),
        (["--ranks", "2", "--config", '{"storage": {"requests": "replicated"}}'], "pikv.storage.requests is 'replicated'"),
        (["--tp", "2", "--ranks", "2"], "--tp 2 with --backend hf"),
        (["--ttft-ms", "0"], "--ttft-ms 0.0: must be above 0"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", str(no_weights), "--port", "0"], f"--model {no_weights}: Error no file named model.safetensors"),
        (["--port", "99999"], "--port 99999: legal are 1 to 65535"),
        (["--kv-tokens", "0"], "--kv-tokens 0: must be above 0"),
        (["--max-length", "-5"], "--max-length -5: must be above 0"),
        (["--tbt-ms", "nan"], "--tbt-ms nan: must be above 0"),
        (["--prefix-rows", "-1"], "--prefix-rows -1: must be 0 or more"),
        (["--chat-template", "/nowhere"], "no file '/nowhere'; --chat-template is a Jinja template"),
    ):
        assert main(["serve", *arguments]) == 2
        assert said in capsys.readouterr().err


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
