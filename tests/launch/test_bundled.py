import pytest
import torch

from pikv_ds import bundled


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return bundled.load()


@pytest.mark.parametrize("length, seed, depth", [(1024, 1, 0.1), (1100, 2, 0.5), (1500, 3, 0.9)])
def test_the_model_answers_the_pass_key(model_and_tokenizer, length, seed, depth):
    model, tokenizer = model_and_tokenizer
    ids, key = bundled.passkey_prompt(tokenizer, length, seed=seed, depth=depth)
    assert len(ids) == length
    out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(out[0, length:]).strip().startswith(key)


def test_prompt_holds_the_key_once_per_template_and_the_question_last(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    ids, key = bundled.passkey_prompt(tokenizer, 300, seed=5, depth=0.0)
    text = tokenizer.decode(ids)
    assert text.startswith(f" The pass key is {key}. Remember it. {key} is the pass key.")
    assert text.endswith(" What is the pass key? The pass key is")
    assert ids == bundled.passkey_prompt(tokenizer, 300, seed=5, depth=0.0)[0]
    assert key != bundled.passkey_prompt(tokenizer, 300, seed=6)[1]


def test_out_of_range_arguments_are_named(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    with pytest.raises(ValueError, match=r"length = 10: legal is \d+ to \d+ tokens"):
        bundled.passkey_prompt(tokenizer, 10)
    with pytest.raises(ValueError, match=r"length = 1000000: legal"):
        bundled.passkey_prompt(tokenizer, 1_000_000)
    with pytest.raises(ValueError, match=r"depth = 2: legal is 0 to 1"):
        bundled.passkey_prompt(tokenizer, 300, depth=2)


def test_bundled_files_are_attributed():
    text = (bundled.model_path().parent / "PROVENANCE.md").read_text()
    assert "CC BY-SA" in text and "haystack.txt" in text and "wikitext" in text.lower()
    assert 35_000 < len(bundled.haystack().encode()) < 45_000
