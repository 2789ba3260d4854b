"""Prompts that hide facts: exact length, the asked fact where it was asked for, everything a function of the seed."""

import pytest

from pikv_ds import bundled
from pikv_ds.bundled.recall import KINDS, Prose, recall_prompt


@pytest.fixture(scope="module")
def prose():
    return Prose(bundled.load()[1], bundled.evaluation_text()[:40_000])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [128, 511, 1024])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_has_its_length_and_its_fact_at_the_depth(prose, kind, length, depth):
    prompt = recall_prompt(prose, length, kind=kind, depth=depth, seed=3)
    text = prose.tokenizer.decode(prompt.ids)
    facts, _, question = text.rpartition(" What is")
    assert len(prompt.ids) == length
    assert facts.count(prompt.answer) == (2 if kind == "passkey" else 1) and prompt.answer not in question
    # A sentence end may be some way off, and nothing stands deeper than right before the question.
    assert abs(prompt.depth - depth) < 0.12 or length == 128, (prompt.depth, depth)


def test_the_number_of_pairs_grows_with_the_length(prose):
    for length, pairs in ((128, 2), (512, 8), (1024, 16), (2048, 24)):
        prompt = recall_prompt(prose, length, kind="code", depth=0.5, seed=0)
        text = prose.tokenizer.decode(prompt.ids)
        attribute = text.rpartition("What is the ")[2].split()[0]
        assert text.count(f" The {attribute} for ") == pairs


def test_the_seed_decides(prose):
    first, again, other = (recall_prompt(prose, 300, kind="code", depth=0.5, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.answer != other.answer


def test_what_does_not_fit_is_refused(prose):
    with pytest.raises(ValueError, match="length = 20: legal for kind 'passkey' with this text is [3-9][0-9] to 1[0-9]{4} tokens"):
        recall_prompt(prose, 20, kind="passkey", depth=0.5, seed=0)
    with pytest.raises(ValueError, match="length = 50000"):
        recall_prompt(prose, 50_000, kind="code", depth=0.5, seed=0)
    with pytest.raises(ValueError, match="kind = 'poem': legal are 'passkey', 'code'"):
        recall_prompt(prose, 300, kind="poem", depth=0.5, seed=0)
