"""Requests that join, fork, pause and leave between forwards of [1, N] tokens, beside each request alone in the model's ordinary cache."""

import pytest
import torch

import pikv_ds
from pikv_ds.adapters.hf.packed import Rows
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import UnsupportedError
from tests.host_guard import host_is_forbidden
from tests.long_form import short_or_long
from tests.tiny_models import FAMILIES, prompt, tiny_model

LENGTHS, CHUNK, NEW = (5, 33, 17, 1, 26), 7, 6
WITH_STATES = ("qwen3_next",)
PACKED = [name for name in FAMILIES if name not in WITH_STATES]
SOURCES = ["previous_layer", "lookahead", "true", "hash"]


def alone(model, ids: list[int]) -> list[torch.Tensor]:
    """Logits after each token of one request in the ordinary cache: a prefill, then token by token."""
    return list(model(torch.tensor([ids])).logits[0])


def packed_forward(model, cache, rows: Rows, tokens: list[int]) -> torch.Tensor:
    with cache.packed(rows) as packed:
        ids = torch.tensor([tokens]) if tokens else packed.index_of_nothing
        return model(input_ids=ids, position_ids=packed.position_ids, past_key_values=cache).logits[0]


class Requests:
    """Texts of known tokens, fed piece by piece; every logit is compared."""

    def __init__(self, model, cache) -> None:
        self.model, self.cache = model, cache
        self.texts: dict[int, list[int]] = {}
        self.expected: dict[int, list[torch.Tensor]] = {}
        self.done: dict[int, int] = {}
        self.order: list[int] = []
        self.largest = 0.0

    def add(self, number: int, text: list[int]) -> None:
        self.texts[number], self.expected[number], self.done[number] = text, alone(self.model, text), 0

    def run(self, pieces: dict[int, int], stay: list[int] = (), forks: dict[int, tuple[int, int]] | None = None) -> None:
        """pieces: request -> tokens now; stay: rows that only stay; forks: new request -> (whose row it forks, tokens kept)."""
        forks, numbers = forks or {}, [*pieces, *stay]
        rows = Rows([], [], [])
        tokens = []
        for number in numbers:
            source, kept = forks.get(number, (number, self.done[number]))
            rows.parent.append(self.order.index(source) if source in self.order else -1)
            rows.keep.append(kept)
            rows.new.append(pieces.get(number, 0))
            self.done[number] = kept + rows.new[-1]
            tokens += self.texts[number][kept : self.done[number]]
        logits = packed_forward(self.model, self.cache, rows, tokens)
        at = 0
        for number, kept, new in zip(numbers, rows.keep, rows.new, strict=True):
            for position in range(kept, kept + new):
                self.largest = max(self.largest, float((logits[at] - self.expected[number][position]).abs().max()))
                at += 1
        self.order = numbers


def feed_all(requests: Requests, texts: list[list[int]]) -> None:
    """One more request joins in every second step, at the front; each runs in chunks, its last tokens one by one, then leaves."""
    waiting, running, step = list(range(len(texts))), [], 0
    while waiting or running:
        if waiting and step % 2 == 0:
            number = waiting.pop(0)
            requests.add(number, texts[number])
            running.insert(0, number)
        left = {number: len(texts[number]) - requests.done[number] for number in running}
        paused = [number for number in running if step % 5 == 3 and number % 2]
        pieces = {number: 1 if left[number] <= NEW else min(CHUNK, left[number] - NEW) for number in running if number not in paused}
        requests.run(pieces, paused)
        running = [number for number in running if requests.done[number] < len(texts[number])]
        step += 1


@pytest.mark.parametrize("name", short_or_long(["mixtral", "deepseek_v3", "gpt_oss"], PACKED))
def test_requests_come_and_go(name):
    model = tiny_model(name)
    texts = [prompt(length + NEW, seed=length)[0].tolist() for length in LENGTHS]
    with torch.no_grad(), pikv_ds.attach(model, {"page_size": 4, "storage": {"num_shards": 2}}) as attached:
        requests = Requests(model, attached.new_cache())
        with host_is_forbidden(model):
            expected = {}
        feed_all(requests, texts)
        assert requests.largest < 2e-5, requests.largest
        assert not expected
        packed_forward(model, requests.cache, Rows([], [], []), [])  # nobody is left: all pages return
        assert requests.cache.stats()["entries_live"] == 0


@pytest.mark.parametrize("source", short_or_long(["true"], SOURCES))
def test_experts_of_packed_tokens_are_their_own(source):
    """Which shard an entry goes to depends on its expert: the same as for each request alone."""
    model, loads = tiny_model("qwen3_moe"), []
    texts = [prompt(length, seed=length)[0].tolist() for length in (9, 14, 3)]
    block = {"page_size": 4, "storage": {"num_shards": 8, "expert_ids": source, "capacity_tokens": 512}}
    with torch.no_grad(), pikv_ds.attach(model, block) as attached:
        packed = attached.new_cache()
        packed_forward(model, packed, Rows([-1] * 3, [0] * 3, [len(text) for text in texts]), sum(texts, []))
        loads.append(CacheProbe(packed.core).loads)
        alone = 0
        for text in texts:
            cache = attached.new_cache()
            model(torch.tensor([text]), past_key_values=cache)
            alone = alone + CacheProbe(cache.core).loads
    assert torch.equal(loads[0], alone)


def test_a_request_takes_over_the_beginning_of_another():
    model = tiny_model("qwen3_moe")
    first = prompt(20, seed=1)[0].tolist()
    second = first[:13] + prompt(8, seed=2)[0].tolist()
    with torch.no_grad(), pikv_ds.attach(model, {"page_size": 4}) as attached:
        requests = Requests(model, attached.new_cache())
        requests.add(0, first)
        requests.add(1, second)
        requests.run({0: 18})
        requests.run({1: 5}, stay=[0], forks={1: (0, 13)})
        requests.run({0: 2, 1: 3})
        assert requests.largest < 2e-5
        assert requests.done == {0: 20, 1: 21}


def test_rows_go_on_in_ordinary_forwards():
    model = tiny_model("qwen3_moe")
    texts = [prompt(length, seed=length)[0].tolist() for length in (6, 11)]
    with torch.no_grad(), pikv_ds.attach(model, {"page_size": 4}) as attached:
        cache = attached.new_cache()
        packed_forward(model, cache, Rows([-1, -1], [0, 0], [5, 10]), texts[0][:5] + texts[1][:10])
        mask = torch.cat([cache.conversation.column_mask, torch.ones(2, 1, dtype=torch.bool)], 1)
        ids, at = torch.tensor([[texts[0][5]], [texts[1][10]]]), torch.tensor([[5], [10]])
        logits = model(ids, attention_mask=mask, position_ids=at, past_key_values=cache).logits[:, -1]
        for row, text in enumerate(texts):
            assert (logits[row] - alone(model, text)[-1]).abs().max() < 2e-5


def test_what_can_not_be_packed_is_refused_by_name():
    model = tiny_model("qwen3_moe")
    with pikv_ds.attach(model) as attached:
        cache = attached.new_cache()
        with torch.no_grad():
            with pytest.raises(UnsupportedError, match="row 0 keeps 3 tokens of row 0, which has 0"):
                packed_forward(model, cache, Rows([0], [3], [1]), [5])
            with (
                pytest.raises(UnsupportedError, match=r"a packed forward of 2 tokens was given tokens \(1, 3\)"),
                cache.packed(Rows([-1], [0], [2])) as packed,
            ):
                model(torch.tensor([[1, 2, 3]]), position_ids=packed.position_ids, past_key_values=cache)
            with pytest.raises(UnsupportedError, match="takes position_ids and no attention_mask"), cache.packed(Rows([-1], [0], [2])):
                model(torch.tensor([[1, 2]]), past_key_values=cache)
        with pytest.raises(UnsupportedError, match=r"run it under torch\.no_grad"):
            packed_forward(model, cache, Rows([-1], [0], [2]), [1, 2])
    with torch.no_grad(), pikv_ds.attach(tiny_model("qwen3_next")) as attached:
        with pytest.raises(UnsupportedError, match="state of a convolution or a recurrence"):
            packed_forward(attached.owner.host.model, attached.new_cache(), Rows([-1], [0], [2]), [1, 2])
