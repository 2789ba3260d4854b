"""scheduling.prefill "auto": a prompt in chunks is kept until its end where its length is known, and what stays is what stays of a prompt
that came in one forward."""

import pytest
import torch

from pikv_ds import bundled
from pikv_ds.adapters.hf.attach import attach
from pikv_ds.adapters.hf.packed import Rows
from pikv_ds.cache.inspect import CacheProbe

LENGTH, CHUNK = 120, 32
POLICY = {"method": "tova", "budget_tokens": 48, "sink_tokens": 4, "recent_tokens": 16}


@pytest.fixture(scope="module")
def model():
    return bundled.load()[0]


def block(**scheduling) -> dict:
    return {"page_size": 8, "scheduling": POLICY | scheduling}


def tokens(rows: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(5, 500, (rows, length), generator=torch.Generator().manual_seed(rows))


def kept(cache, rows: int) -> list[list[int]]:
    """Positions that are stored, by row, of the last layer."""
    return [sorted(sum(tables, [])) for tables in CacheProbe(cache.core).kept(3)[:rows]]


@torch.no_grad()
def fed(model, cache, ids, chunk: int, *, known: bool) -> list[int]:
    """Stored entries of the first row and layer after each forward."""
    if known:
        cache.expect_prompt(ids.shape[1])
    seen = []
    for part in ids.split(chunk, 1):
        model(part, past_key_values=cache, use_cache=True)
        seen.append(len(kept(cache, 1)[0]))
    return seen


def test_a_prompt_of_known_length_is_kept_until_its_end(model):
    ids = tokens(2)
    with attach(model, block()) as cache:
        one = cache.new_cache()
        assert fed(model, one, ids, LENGTH, known=False) == [48]
        in_chunks = cache.new_cache()
        assert fed(model, in_chunks, ids, CHUNK, known=True) == [32, 64, 96, 48]
        unknown = cache.new_cache()
        assert max(fed(model, unknown, ids, CHUNK, known=False)) == 48
        assert kept(in_chunks, 2) == kept(one, 2) != kept(unknown, 2)


def test_evict_goes_by_chunks_even_where_the_length_is_known(model):
    with attach(model, block(prefill="evict")) as cache:
        assert max(fed(model, cache.new_cache(), tokens(2), CHUNK, known=True)) == 48


def test_what_follows_the_prompt_is_evicted_as_ever(model):
    with attach(model, block()) as cache, torch.no_grad():
        one = cache.new_cache()
        fed(model, one, tokens(1), CHUNK, known=True)
        for step in range(20):
            model(torch.tensor([[7 + step]]), past_key_values=one, use_cache=True)
            assert len(kept(one, 1)[0]) <= 48
        fed(model, one, tokens(1), CHUNK, known=False)
        stayed = len(kept(one, 1)[0])
        assert 40 < stayed <= 48
        seen = fed(model, one, tokens(1), CHUNK, known=True)
        assert seen[:3] == [stayed + 32, stayed + 64, stayed + 96] and seen[3] <= 48, "a second turn"


def test_generate_knows_how_long_its_prompt_is(model):
    ids, mask = tokens(2), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :40] = 0  # padding on the left
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    with attach(model, block()) as cache, torch.no_grad():
        most = []
        cache.owner.end_of_step_callbacks.append(lambda step: most.append(len(kept(cache, 1)[0])))
        whole = model.generate(ids, **options)
        chunks = model.generate(ids, prefill_chunk_size=CHUNK, **options)
        del cache.owner.end_of_step_callbacks[:]
    assert most[6:10] == [32, 64, 96, 48] and len(most) == 15
    with attach(model, block(prefill="evict")), torch.no_grad():
        evicted = model.generate(ids, prefill_chunk_size=CHUNK, **options)
    assert chunks.shape == whole.shape == evicted.shape
    assert chunks.equal(whole), "what is asked at the end finds what stood at the beginning"


def test_requests_that_are_packed_have_prompts_of_their_own(model):
    """One decodes, one is in its prompt, one pauses in it: each by itself."""
    texts = [tokens(1, 90)[0].tolist(), tokens(2, 130)[0].tolist(), tokens(3, 100)[0].tolist()]

    def run(cache, rows: Rows, new: list[int]) -> None:
        with cache.packed(rows) as packed:
            model(input_ids=torch.tensor([new]), position_ids=packed.position_ids, past_key_values=cache, use_cache=True)

    with attach(model, block()) as attached, torch.no_grad():
        cache = attached.new_cache()
        run(cache, Rows([-1, -1, -1], [0, 0, 0], [90, 64, 60], [90, 130, 100]), texts[0] + texts[1][:64] + texts[2][:60])
        assert [len(row) for row in kept(cache, 3)][1:] == [64, 60] and len(kept(cache, 3)[0]) <= 48
        run(cache, Rows([0, 1, 2], [90, 64, 60], [1, 32, 0], [0, 130, 100]), [7, *texts[1][64:96]])
        assert [len(row) for row in kept(cache, 3)][1:] == [96, 60] and len(kept(cache, 3)[0]) <= 48
        run(cache, Rows([0, 1, 2], [91, 96, 60], [1, 34, 40], [0, 130, 100]), [8, *texts[1][96:], *texts[2][60:]])
        found = kept(cache, 3)
        assert [len(row) <= 48 for row in found] == [True] * 3
        for row, text in ((1, texts[1]), (2, texts[2])):
            alone = attached.new_cache()
            fed(model, alone, torch.tensor([text]), len(text), known=False)
            assert kept(alone, 1)[0] == found[row]
