"""A live service on one rank: the openai client, what lm-eval sends, load, refusals, metrics. The oracle is the model alone."""

import asyncio
import json
import threading
import time

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pikv_ds.bundled import model_path
from pikv_ds.launch.bench import serve as load_generator
from pikv_ds.launch.cli import build_parser
from pikv_ds.launch.serving.http.app import build_app
from tests.serving.live import CHAT_TEMPLATE, engine_of, served, spec_of

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def engine():
    with engine_of(spec_of("--max-length", "512", chat_template=CHAT_TEMPLATE, max_waiting=40, tbt_ms=50.0)) as running:
        yield running


@pytest.fixture(scope="module")
def app(engine):
    return build_app(engine)


@pytest.fixture(scope="module")
def url(engine, app):
    with served(engine, app) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)


def greedy(model, ids: list[int], count: int) -> list[int]:
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)[0, len(ids) :].tolist()


def test_load_of_mixed_lengths_loses_nothing_and_every_text_is_that_of_a_single_run(url, tmp_path):
    file = tmp_path / "row.json"
    arguments = ["--requests", "16", "--at-once", "8", "--longest-prompt", "90", "--longest-answer", "8", "--shared", "0.5"]
    args = build_parser().parse_args(["bench", "serve", "--url", url, *arguments, "--json", str(file)])
    assert load_generator.run(args) == 0
    row = json.loads(file.read_text())["rows"][0]
    assert (row["requests"], row["lost"], row["wrong"]) == (16, 0, 0)
    assert row["tokens_s"] > 0 and row["ttft_p50"] <= row["ttft_p99"] and set(row["attainment"]) == {"ttft", "tbt"}


def test_prompts_that_begin_alike_take_over_entries(client, url, model, tokenizer):
    before = httpx.get(f"{url}/status").json()
    ids = tokenizer("The castle was built in the twelfth century by the king, who lived in it with his family for many years.").input_ids
    for more in ([5, 6], [9, 10, 11]):
        answer = client.completions.create(model="bundled", prompt=ids + more, max_tokens=6, temperature=0, extra_body={"ignore_eos": True})
        assert answer.choices[0].text == tokenizer.decode(greedy(model, ids + more, 6))
    assert answer.usage.prompt_tokens_details.cached_tokens == len(ids) // 16 * 16 > 0
    assert httpx.get(f"{url}/status").json()["prefix_hit_rate"] > 0 and before["state"] == "ok"


def test_log_probabilities_of_prompt_and_answer(client, model, tokenizer):
    """What lm-eval's local-completions sends; every number is the model's own."""
    prompts = [tokenizer(text).input_ids for text in ("In the year 1998 the river", "It is")]
    options = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    answer = client.completions.create(model="bundled", prompt=prompts, **options)
    for ids, choice in zip(prompts, answer.choices, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        told = choice.logprobs
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None and len(told.token_logprobs) == len(ids) + 1
        own = [float(expected[i, token]) for i, token in enumerate(ids[1:])] + [float(expected[-1].max())]
        assert told.token_logprobs[1:] == pytest.approx(own, abs=2e-5)
        assert [max(top.values()) for top in told.top_logprobs[1:]] == pytest.approx(expected.amax(-1).tolist(), abs=2e-5)
        assert "".join(told.tokens) == choice.text and choice.text.startswith(tokenizer.decode(ids))
        assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
    scored = client.completions.create(model="bundled", prompt=prompts[0], max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == tokenizer.decode(prompts[0]) and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(answer.choices[0].logprobs.token_logprobs[1:-1], abs=2e-5)


def test_streams_stops_and_seeds(client, model, tokenizer):
    ids = tokenizer("The history of").input_ids
    text = tokenizer.decode(greedy(model, ids, 12))
    whole = {"model": "bundled", "prompt": "The history of", "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    chunks = list(client.completions.create(**whole, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text and chunks[-1].usage.completion_tokens == 12
    assert len(chunks) == 13 and chunks[-2].choices[0].finish_reason == "length"
    stop = text[8:11]
    stopped = client.completions.create(**whole, temperature=0, stop=[stop])
    assert stopped.choices[0].text == text[: text.find(stop)] and stopped.choices[0].finish_reason == "stop"
    echoed = client.completions.create(**whole, temperature=0, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in echoed) == "The history of" + text
    draws = [client.completions.create(**whole, seed=7, n=3, temperature=0.9, top_p=0.9).choices for _ in range(2)]
    assert [one.text for one in draws[0]] == [one.text for one in draws[1]] and len({one.text for one in draws[0]}) > 1


def test_chat(client, model, tokenizer):
    messages = [{"role": "user", "content": "What is the river?"}]
    ids = tokenizer("user: What is the river?\nassistant:").input_ids
    text = tokenizer.decode(greedy(model, ids, 8))
    options = {"model": "bundled", "messages": messages, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(**options, max_completion_tokens=8, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == text and answer.usage.completion_tokens == 8
    told = answer.choices[0].logprobs.content
    assert len(told) == 8 and all(each.logprob == each.top_logprobs[0].logprob for each in told)
    chunks = list(client.chat.completions.create(**options, max_tokens=8, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": [5] * 500, "max_tokens": 20}, 400, "500 tokens of prompt and 20 to generate are 520; at most 512 fit"),
        ({"prompt": "a", "suffixx": 1}, 400, "suffixx: not known here"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix: "),
        ({"prompt": "a", "temperature": -1}, 400, "temperature: "),
        ({"prompt": "a", "best_of": 3}, 400, "best_of 3 with n 1"),
        ({"prompt": [5, 99999]}, 400, "token 99999 of the prompt is none of the model's 2048"),
        ({"prompt": "a", "logit_bias": {"2048": 1}}, 400, "token 2048 of logit_bias is none of the model's 2048"),
        ({"prompt": "a", "logit_bias": {"7": 1000}}, 400, "logit_bias.7: "),
        ({"prompt": ""}, 400, "the prompt has no tokens"),
        ({"prompt": []}, 400, "prompt is an empty list"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "no model 'gpt-4' here; there is 'bundled'"),
        ({"prompt": ["a", 3]}, 400, "prompt: Input should be a valid string"),
        ({"prompt": [True]}, 400, "Input should be a number, not true"),
        ({"prompt": "a", "logprobs": True}, 400, "logprobs: Input should be a number, not true"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options needs stream: true"),
        ({"prompt": "a\ud800"}, 400, r"prompt holds '\ud800', half a surrogate pair"),
        ({"prompt": "a", "stop": ["\ud800"]}, 400, r"stop holds '\ud800'"),
        ({"prompt": "a", "\ud800": 1}, 400, "the body: Input should be a valid string, unable to parse"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, r"messages holds '\ud800'"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, 400, "top_logprobs needs logprobs: true"),
        ({"messages": [{"role": "user", "content": "a " * 504}]}, 400, "tokens of prompt leave no room for an answer; at most 512 fit"),
    ],
)
def test_refusals_name_what_is_wrong(url, body, status, said):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = httpx.post(f"{url}{path}", content=json.dumps(body), headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status) and said in error["message"], error
    assert error["param"] is None or "." not in error["param"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "said"),
    [
        ("POST", "/v1/completions", b"{nope", JSON, 400, "the body is not JSON: Expecting property name"),
        ("POST", "/v1/completions", b'{"prompt": "\xff"}', JSON, 400, "error parsing the body"),
        ("POST", "/v1/completions", b"[" * 100_000, JSON, 400, "error parsing the body"),
        ("POST", "/v1/completions", b"[1]", JSON, 400, "the body: Input should be a valid dictionary"),
        ("POST", "/v1/completions", b'{"prompt": "a"}', {"content-type": "text/plain"}, 415, "the header content-type: application/json"),
        ("POST", "/v1/embeddings", b"{}", JSON, 404, "POST /v1/embeddings: Not Found"),
        ("GET", "/v1/completions", None, {}, 405, "GET /v1/completions: Method Not Allowed"),
    ],
)
def test_what_is_no_request_at_all_is_answered_in_the_same_layout(url, method, path, content, headers, status, said):
    answer = httpx.request(method, f"{url}{path}", content=content, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, status, "invalid_request_error") and said in error["message"]


def test_a_bug_is_told_as_one(app, engine, monkeypatch):
    """Straight to the application: a server would log the error besides."""
    monkeypatch.setattr(engine, "submit", _fail)
    sent: list[dict] = []
    with pytest.raises(RuntimeError, match="the step has failed"):
        call(app, {"prompt": "a"}, sent)
    assert sent[0]["status"] == 500 and b"an error of the service: RuntimeError: the step has failed" in sent[1]["body"]


def test_a_client_that_is_gone_before_its_stream_begins_frees_its_place(app, engine):
    cancelled = engine.counts.requests.labels("cancelled")._value
    before = cancelled.get()
    call(app, {"prompt": "The", "max_tokens": 500, "ignore_eos": True, "stream": True}, [], {"type": "http.disconnect"})
    _until_idle(engine)
    assert cancelled.get() == before + 1


def call(app, body: dict, sent: list[dict], *then: dict) -> None:
    """POST /v1/completions to an application; then: what comes from the client at once after it."""
    left = [{"type": "http.request", "body": json.dumps(body).encode()}, *then]

    async def receive() -> dict:
        return left.pop(0) if left else await asyncio.Event().wait()

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))


def _until_idle(engine) -> None:
    deadline = time.monotonic() + 20
    while engine.num_running or engine.num_waiting:
        assert time.monotonic() < deadline, "requests of clients that are gone still run"
        time.sleep(0.02)


def test_a_prompt_that_fills_the_length_is_scored(client, model):
    ids = [5 + i % 40 for i in range(512)]
    told = client.completions.create(model="bundled", prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0].logprobs
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert told.token_logprobs[1:] == pytest.approx([float(expected[i, token]) for i, token in enumerate(ids[1:])], abs=5e-5)


def test_too_many_requests_are_refused_with_429_and_the_others_are_served(url):
    body = {"prompt": ["The king of"] * 41, "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 429 and "at most 40 may" in answer.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/completions", json=body | {"prompt": ["The king of"] * 40}, timeout=60).status_code == 200


def test_a_client_that_hangs_up_frees_its_place(url, engine):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json={"prompt": "The", "max_tokens": 500, "ignore_eos": True}, timeout=0.5)
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"prompt": "The", "max_tokens": 500, "ignore_eos": True, "stream": True}
    ) as stream:
        next(stream.iter_lines())
    _until_idle(engine)


def test_health_models_metrics_and_page(url, client):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert [model.id for model in client.models.list()] == ["bundled"] and client.models.retrieve("bundled").id == "bundled"
    time.sleep(1.1)
    client.completions.create(model="bundled", prompt="The", max_tokens=4)
    told = httpx.get(f"{url}/metrics").text
    for name in ('pikv_kv_bytes{rank="0"}', 'pikv_kv_expert_bytes_written{expert="7"}', 'pikv_target_total{met="true",schedule="deadline"'):
        assert name in told, told
    status = httpx.get(f"{url}/status").json()
    assert status["kv_bytes"][0] > 0 and len(status["expert_bytes_written"]) == 8 and 0 <= status["tbt_met"] <= 1
    page = httpx.get(url).text
    assert "KV bytes per rank" in page and "http" not in page.replace("http-equiv", "")  # nothing from elsewhere


def test_a_failing_step_ends_the_service_and_every_request_hears_it():
    with _quiet_threads(), engine_of(spec_of("--max-length", "64")) as engine, served(engine) as url:
        engine.rank.runner.step = _fail
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "The", "max_tokens": 4})
        assert answer.status_code == 503 and "RuntimeError: the step has failed" in answer.json()["error"]["message"]
        answer = httpx.get(f"{url}/health")
        assert answer.status_code == 503 and "the step has failed" in answer.json()["status"]


def _fail(*arguments):
    raise RuntimeError("the step has failed")


class _quiet_threads:  # noqa: N801
    """The engine's thread ends with the error, which pytest would report."""

    def __enter__(self) -> None:
        self.hook, threading.excepthook = threading.excepthook, lambda args: None

    def __exit__(self, *exc) -> None:
        threading.excepthook = self.hook
