"""Chat turns in a session: the tokens of a fresh prefill where the cache is exact, else those of one cache that was never left."""

import gc

import pytest
import torch
from transformers import GenerationConfig

import pikv_ds
from pikv_ds.errors import UnsupportedError
from tests.retention_blocks import needed
from tests.tiny_models import prompt, tiny_model

NEW = 6
LAST_BITS = {"rtol": 0, "atol": 5e-6}  # how an op cuts its work follows the width of a table, and that of a copy is its own
EXACT = {"page_size": 4, "storage": {"num_shards": 2}}
OTHERS = {
    "int8": {"page_size": 64, "compression": {"method": "int8"}},
    "int4 behind a raw window": {"page_size": 64, "compression": {"method": "int4", "raw_recent_tokens": 64}},
    "streaming": {"page_size": 4, "scheduling": {"method": "streaming_llm", "budget_tokens": 24, "sink_tokens": 2, "recent_tokens": 6}},
    "h2o": {"page_size": 4, "scheduling": {"method": "h2o", "budget_tokens": 24, "sink_tokens": 2, "recent_tokens": 6}},
    "bounds": {"page_size": 4, "routing": {"method": "bounds", "budget_pages": 4, "sink_tokens": 2, "recent_tokens": 5}},
}


def options(**more):
    return {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW, **more}


def generate(model, ids, cache=None, **more):
    given = {} if cache is None else {"past_key_values": cache}
    config = GenerationConfig(output_logits=True, return_dict_in_generate=True, **options(**more))
    made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **given)
    return made.sequences.clone(), torch.stack(made.logits, 1)


class Columns:
    """Of the first forward of each generation."""

    def __init__(self, model):
        self.run = []
        model.register_forward_pre_hook(lambda module, args, given: self.run.append(given["input_ids"].shape[1]), with_kwargs=True)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_turns_are_those_of_a_fresh_prefill(family):
    model = tiny_model(family)
    ids, expected, said = prompt(20, seed=1), [], None
    turns = [prompt(n, seed=10 + n) for n in (20, 7, 1, 30)]
    for turn in turns:
        ids = turn if said is None else torch.cat([said, turn], 1)
        said, logits = generate(model, ids)
        expected.append((said, logits))
    with pikv_ds.attach(model, EXACT) as cache:
        columns = Columns(model)
        with cache.session("anna") as session:
            said = None
            for turn, (tokens, logits) in zip(turns, expected, strict=True):
                ids = turn if said is None else torch.cat([said, turn], 1)
                columns.run.clear()
                generate(model, prompt(9, seed=3))  # somebody else's, in between
                columns.run.clear()
                held = session.columns
                said, got = generate(model, ids, session)
                assert columns.run[0] == ids.shape[1] - held
                assert said.tolist() == tokens.tolist()
                torch.testing.assert_close(got, logits, rtol=0, atol=2e-5)
            assert session.tokens == said[:, :-1].tolist()
            assert cache.sessions == ["anna"] and cache.session("anna") is session
        assert cache.sessions == []
        with pytest.raises(UnsupportedError, match="was freed"):
            generate(model, said, session)


@torch.no_grad()
def test_a_turn_is_all_that_generate_is_given():
    model = tiny_model("qwen3_moe")
    first, second = prompt(20, seed=1), prompt(5, seed=2)
    whole = model.generate(first, **options())
    whole = model.generate(torch.cat([whole, second], 1), **options())
    with pikv_ds.attach(model, EXACT) as cache:
        session = cache.session("anna")
        session.generate(first, **options())
        assert session.generate(second[0].tolist(), **options()).tolist() == whole.tolist()


@torch.no_grad()
def test_another_conversation_is_refused_and_a_rewound_one_is_not():
    model = tiny_model("qwen3_moe")
    ids, other = prompt(20, seed=1), prompt(20, seed=1)
    other[0, 11] = (other[0, 11] + 1) % 100 + 3
    expected = generate(model, torch.cat([other, prompt(4, seed=5)], 1))
    with pikv_ds.attach(model, EXACT) as cache:
        session = cache.session("anna")
        generate(model, ids, session)
        wrong = torch.cat([other, prompt(10, seed=5)], 1)
        with pytest.raises(UnsupportedError, match="others from token 11 on"):
            generate(model, wrong, session)
        right = torch.cat([other, prompt(4, seed=5)], 1)
        assert session.rewind(right) == 11
        got = generate(model, right, session)
        assert got[0].tolist() == expected[0].tolist()
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_rewind_behind_a_window_is_refused():
    model = tiny_model("mixtral")
    with pikv_ds.attach(model, EXACT) as cache:
        session = cache.session("anna")
        generate(model, prompt(40, seed=1), session)
        other = torch.cat([prompt(40, seed=1)[:, :20], prompt(9, seed=2)], 1)
        session.rewind(other)
        with pytest.raises(RuntimeError, match="window"):
            generate(model, other, session)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_stored_is_what_one_cache_would_have(name, tmp_path):
    """Beside one cache object that is passed on by hand, with other generations in between, bit for bit."""
    model = tiny_model("qwen3_moe")
    block = OTHERS[name] | {"scheduling": OTHERS[name].get("scheduling", {}) | needed(name, tmp_path, layers=2, heads=2, width=32)}
    turns = [prompt(n, seed=10 + n) for n in (90, 7, 40)]

    def talk(model, cache, between):
        said, all_logits = None, []
        for turn in turns:
            between()
            said, logits = generate(model, turn if said is None else torch.cat([said, turn], 1), cache)
            all_logits.append(logits)
        return said, torch.cat(all_logits, 1)

    with pikv_ds.attach(model, block) as attached:
        expected = talk(model, attached.new_cache(), lambda: None)
        session = attached.session("anna")

        def others():
            generate(model, prompt(30, seed=4))
            with attached.session("bert") as other:
                generate(model, prompt(30, seed=5), other)

        got = talk(model, session, others)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        stats = session.stats()
        live, appended = stats["entries_live"], stats["entries_appended"]
        assert live + stats["entries_evicted"] + stats["entries_expired"] == appended


@torch.no_grad()
@pytest.mark.parametrize("name", ["exact", *OTHERS])
def test_a_fork_goes_its_own_way(name):
    model = tiny_model("qwen3_moe")
    block = EXACT if name == "exact" else OTHERS[name]
    first, left, right = prompt(70, seed=1), prompt(5, seed=2), prompt(6, seed=3)
    with pikv_ds.attach(model, block) as cache:
        expected = {}
        for side, turn in (("left", left), ("right", right)):
            alone = cache.session("alone " + side)
            said, _ = generate(model, first, alone)
            expected[side] = generate(model, torch.cat([said, turn], 1), alone)
        session = cache.session("anna")
        said, _ = generate(model, first, session)
        with pytest.raises(UnsupportedError, match="exists already"):
            session.fork("alone left")
        fork = session.fork("bert")
        assert fork.tokens == session.tokens and fork.stats()["entries_live"] == session.stats()["entries_live"]
        for side, turn, one in (("right", right, fork), ("left", left, session)):
            got = generate(model, torch.cat([said, turn], 1), one)
            assert torch.equal(got[0], expected[side][0])
            torch.testing.assert_close(got[1], expected[side][1], **LAST_BITS)
        stats = fork.stats()
        gone = stats["entries_evicted"] + stats["entries_expired"] + stats["entries_cropped"]
        assert stats["entries_loaded"] and stats["entries_live"] + gone == stats["entries_loaded"] + stats["entries_appended"]


@torch.no_grad()
def test_a_freed_session_gives_its_memory_back():
    model = tiny_model("qwen3_moe")
    with pikv_ds.attach(model, EXACT) as cache:
        session = cache.session("anna")
        generate(model, prompt(40, seed=1), session)
        held = session.conversation.held_core
        assert held.pages.entries_live
        session.close()
        gc.collect()
        assert not int(held.pages.entries_live) and not sum(pool.nbytes for pool in held.pages.all_pools)
        assert cache.session("anna").columns == 0


@torch.no_grad()
def test_with_prefixes_a_session_has_a_store_of_its_own():
    model = tiny_model("qwen3_moe")
    ids = prompt(40, seed=1)
    block = {"page_size": 4, "storage": {"prefix": {"enabled": True, "budget_tokens": 400}}}
    expected = generate(model, ids)[0]
    turn = torch.cat([expected, prompt(5, seed=2)], 1)
    second = generate(model, turn)[0]
    with pikv_ds.attach(model, block) as cache:
        session = cache.session("anna")
        for _ in range(2):
            assert generate(model, ids)[0].tolist() == expected.tolist()
        assert generate(model, ids, session)[0].tolist() == expected.tolist()
        assert generate(model, ids)[0].tolist() == expected.tolist()
        assert generate(model, turn, session)[0].tolist() == second.tolist()
        assert session.stats()["rows_parked"] == 0
        del session
