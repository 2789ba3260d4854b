"""Prompts of RULER's families: exactly as long as asked for, the answer is what the text says, read by other code than wrote it."""

import re
from collections import Counter

import pytest

from pikv_ds import bundled
from pikv_ds.bundled.recall import Prose
from pikv_ds.errors import ConfigError
from pikv_ds.launch.evaluation.asked import Asked, Frame, text_of
from pikv_ds.launch.evaluation.ruler import COMMON, HOPS, KEYS, ruler_prompts
from pikv_ds.launch.evaluation.spec import RULER
from tests.launch.test_eval import spec

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module", params=["plain", "chat"])
def prose(request):
    _, tokenizer = bundled.load()
    tokenizer.chat_template = TEMPLATE if request.param == "chat" else None
    return Prose(tokenizer, bundled.evaluation_text())


def read(prose, asked: Asked) -> str:
    return prose.tokenizer.decode(asked.ids)


def values_in(text: str) -> dict[str, str]:
    return dict(re.findall(r"special magic numbers for (\w+) is: (\d+)\.", text))


def asked_numbers(text: str, keys: int) -> tuple[str, ...]:
    found = values_in(text)
    assert len(found) == keys
    return (found[re.search(r"special magic number for (\w+) mentioned", text)[1]],)


def asked_value(text: str) -> tuple[str, ...]:
    pairs = dict(re.findall(r"([a-z]+-[a-z]+): (\d+)\n", text))
    assert len(pairs) > 5
    return (pairs[re.search(r"value of the key ([a-z-]+) in", text)[1]],)


def asked_variables(text: str) -> tuple[str, ...]:
    held: dict[str, str] = {}
    for name, value in re.findall(r"VAR ([A-Z]{3}) = (VAR [A-Z]{3}|\d+)\.", text):
        held[name] = value if value.isdigit() else held[value.removeprefix("VAR ")]  # KeyError: read before it was set
    wanted = re.search(r"assigned the value (\d+) in the text", text)[1]
    assert len(held) == 2 * (HOPS + 1)
    return tuple(name for name, value in held.items() if value == wanted)


def asked_words(text: str) -> tuple[str, ...]:
    listed = text.partition("most often.\n")[2].partition("\nWhat are the")[0].split(" ")
    counts = Counter(listed).most_common(COMMON + 1)
    assert counts[COMMON - 1][1] >= 2 * counts[COMMON][1], "common words stand out"
    return tuple(sorted(name for name, _ in counts[:COMMON]))


READERS = {
    "passkey": lambda text: asked_numbers(text, 1), "multikey": lambda text: asked_numbers(text, KEYS), "retrieval": asked_value,
    "tracking": asked_variables, "words": asked_words,
}  # fmt: skip


@pytest.mark.parametrize("task", RULER)
def test_the_answer_is_what_the_text_says(prose, task):
    run = spec(context=700, samples=5, seed=3)
    prompts = ruler_prompts(run, prose, task)
    assert len({tuple(prompt.ids) for prompt in prompts}) == 5
    for prompt in prompts:
        text = read(prose, prompt)
        assert len(prompt.ids) + prompt.new_tokens == run.context
        expected = READERS[task](text)
        assert tuple(sorted(prompt.answers)) == tuple(sorted(expected))
        tail = prose.tokenizer.decode(prompt.ids[-prompt.question_tokens :])
        assert tail.lstrip().startswith(("What", "Find")) and not any(answer in tail for answer in prompt.answers)
        assert ("<|assistant|>" in tail) == bool(prose.tokenizer.chat_template) and text.startswith("<|user|>") == ("<|assistant|>" in tail)
    assert ruler_prompts(run, prose, task) == prompts, "the seed decides"


@pytest.mark.parametrize("task", ["passkey", "multikey", "retrieval"])
def test_depths_are_spread_over_the_prompt(prose, task):
    prompts = ruler_prompts(spec(context=900, samples=4), prose, task)
    depths = [prompt.depth for prompt in prompts]
    assert depths == sorted(depths) and depths[0] < 0.35 < 0.65 < depths[-1] < 1
    for prompt in prompts:
        from_there = prose.tokenizer.decode(prompt.ids[round(prompt.depth * len(prompt.ids)) :])
        fact = from_there.partition("\n" if task == "retrieval" else ".")[0]
        assert prompt.answers[0] in fact, (task, fact)


def test_the_score_is_the_share_of_the_answers():
    asked = Asked("tracking", [], ("ABC", "DEF"), None, 1, 8)
    assert [asked.score(text) for text in ("abc, DEF", "it is DEF", "none")] == [1.0, 0.5, 0.0]
    first = Asked("passkey", [], ("12345",), 0.5, 1, 8, starts=True)
    assert first.score(" 12345.") == 1.0 and first.score("not 12345") == 0.0


def test_what_follows_the_end_of_a_text_is_not_read(prose):
    end = prose.tokenizer.eos_token_id
    assert text_of(prose.tokenizer, [*prose.encode("yes"), end, *prose.encode(" 12345")]).strip() == "yes"


def test_plain_prompts_can_be_asked_for():
    _, tokenizer = bundled.load()
    tokenizer.chat_template = TEMPLATE
    made = Prose(tokenizer, bundled.evaluation_text())
    assert Frame(made, None).is_chat and not Frame(made, False).is_chat
    assert read(made, ruler_prompts(spec(context=400, samples=1, template=False), made, "passkey")[0]).startswith("Some special")


def test_a_context_without_room_is_refused(prose):
    for task in RULER:
        with pytest.raises(ConfigError, match=f"for task {task}: .* tokens are left for .*; use a longer one"):
            ruler_prompts(spec(context=60, samples=1), prose, task)
