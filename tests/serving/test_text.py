"""Tokens -> text as they come, stop strings, and the tokens that sampling chooses."""

import pytest
import torch
from transformers import AutoTokenizer

from pikv_ds.bundled import evaluation_text, model_path
from pikv_ds.launch.serving.messages import Sampling
from pikv_ds.launch.serving.sampling import Sampler, logprob_of, of_prompt
from pikv_ds.launch.serving.text import TextOut, bytes_of


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)


def told(tokenizer, prompt: str, text: str, stops=()) -> tuple[list[str], TextOut]:
    """What a client is given, token by token; the last piece comes with the end."""
    before = tokenizer(prompt).input_ids
    ids = tokenizer(prompt + text).input_ids[len(before) :]
    out, pieces = TextOut(tokenizer, before, stops), []
    for at, token in enumerate(ids):
        out.push(token)
        last = out.stopped or at == len(ids) - 1
        if last:
            out.finish()
        pieces.append(out.take(last=last))
        if out.stopped:
            break
    return pieces, out


def test_pieces_are_the_text(tokenizer):
    for text in (evaluation_text()[:600], " naïve café – 北京 🙂 end", "\n\n  two  spaces"):
        pieces, _ = told(tokenizer, "It is", text)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_of_tokens_are_those_of_the_text(tokenizer):
    text = evaluation_text()[:200] + " naïve café – 北京 🙂 end"
    ids = tokenizer(text).input_ids
    assert b"".join(bytes(bytes_of(tokenizer, token)) for token in ids).decode() == text
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids), "no token is half a character"


class _Unknown:
    """A tokenizer that says of no token which bytes it has, but of its byte tokens."""

    pieces = ("<0xE5>", "?\u2581")

    def decode(self, ids: list[int]) -> str:
        return "\ufffd"

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token]


def test_bytes_of_other_tokenizers():
    assert bytes_of(_Unknown(), 0) == [0xE5] and bytes_of(_Unknown(), 1) is None


def test_a_stop_string_is_never_given_in_part(tokenizer):
    pieces, out = told(tokenizer, "One", " two three four five", ["ree fo"])
    assert out.stopped and "".join(pieces) == " two th"
    pieces, out = told(tokenizer, "One", " two three four", ["four!", "xx"])
    assert not out.stopped and "".join(pieces) == " two three four"  # what waited for its end comes last
    pieces, out = told(tokenizer, "One", " two three four", ["three", "two"])
    assert "".join(pieces) == " "


def test_sampling():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert Sampler(Sampling(temperature=0), logits.device).choose(logits) == (1, None)
    assert Sampler(Sampling(temperature=0, bias={2: 5.0}), logits.device).choose(logits)[0] == 2
    said = Sampler(Sampling(temperature=0, frequency_penalty=0.6, presence_penalty=0.5), logits.device)
    assert [said.choose(logits)[0] for _ in range(3)] == [1, 2, 1]  # 3 - 1.1 < 2; then 2 - 1.1 < 1.9
    draws = [[Sampler(Sampling(seed=seed), logits.device).choose(logits)[0]] for seed in range(200)]
    assert draws == [[Sampler(Sampling(seed=seed), logits.device).choose(logits)[0]] for seed in range(200)]
    share = sum(draw == [1] for draw in draws) / 200
    assert abs(share - float(logits.softmax(-1)[1])) < 0.1
    assert {Sampler(Sampling(seed=seed, top_k=2), logits.device).choose(logits)[0] for seed in range(100)} == {1, 2}
    assert {Sampler(Sampling(seed=seed, top_p=0.5), logits.device).choose(logits)[0] for seed in range(100)} == {1}


def test_logprobs():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    one = logprob_of(expected[0], 3, 2)
    assert one.logprob == pytest.approx(float(expected[0, 3])) and len(one.top) == 2
    several = of_prompt(logits, [1, 2, 3, 4], 1)
    assert [each.token for each in several] == [1, 2, 3, 4]
    assert [each.logprob for each in several] == pytest.approx([float(expected[i, i + 1]) for i in range(4)])
    assert [each.top[0][0] for each in several] == expected[:4].argmax(-1).tolist()
