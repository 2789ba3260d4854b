"""generate() of requests that begin like earlier ones: the same tokens and logits as without, and only the rest is run."""

import pytest
import torch
from transformers import GenerationConfig

import pikv_ds
from pikv_ds.errors import ConfigError, UnsupportedError
from tests.tiny_models import prompt, tiny_model

NEW = 6
ON = {"enabled": True, "budget_tokens": 1000}


def block(num_shards: int = 2, **more) -> dict:
    return {"page_size": 4, "storage": {"num_shards": num_shards, "prefix": {**ON, **more}}}


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options
    )
    made = model.generate(ids, attention_mask=mask, generation_config=config)
    return made.sequences.clone(), None if made.logits is None else torch.stack(made.logits, 1)  # nobody holds the cache any longer


class Tokens:
    """Counts columns that the decoder runs."""

    def __init__(self, model):
        self.columns = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.columns.append((args[0] if args else kwargs["input_ids"]).shape[1])


def tail(prefix, seed, length=5):
    return torch.cat([prefix, prompt(length, seed=seed, batch=prefix.shape[0])], 1)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_the_rest_is_run_and_answers_as_the_whole(family):
    model = tiny_model(family)
    prefix = prompt(40, seed=1)
    asked = [tail(prefix, seed) for seed in (2, 3, 4)] + [prompt(30, seed=9), tail(prefix, 5, length=20)]
    with pikv_ds.attach(model, {"page_size": 4, "storage": {"num_shards": 2}}):
        expected = [generate(model, ids) for ids in asked]
    tokens = Tokens(model)
    with pikv_ds.attach(model, block()) as cache:
        for at, (ids, (sequences, logits)) in enumerate(zip(asked, expected, strict=True)):
            tokens.columns.clear()
            got = generate(model, ids)
            assert torch.equal(got[0], sequences)
            torch.testing.assert_close(got[1], logits, rtol=0, atol=1e-5)
            assert tokens.columns[0] == (ids.shape[1] if at in (0, 3) else ids.shape[1] - 40)
            stats = cache.stats()
            live, gone = (stats[f"entries_{name}"] for name in ("live", "cropped"))
            assert live + gone == stats["entries_appended"] + stats["entries_forked"]
        assert (stats["prefix_requests"], stats["prefix_hits"], stats["prefix_tokens_reused"]) == (5, 3, 120)
        assert stats["prefix_hit_rate"] == 120 / sum(ids.shape[1] for ids in asked)
        assert stats["prefix_tokens_parked"] <= 1000 and stats["kv_bytes_parked"] > 0 and stats["rows_parked"] > 1


@torch.no_grad()
def test_a_padded_batch_reuses_the_columns_that_all_rows_know():
    model, prefix = tiny_model("qwen3_moe"), prompt(40, seed=1)
    first = torch.cat([prefix, prompt(8, seed=2)], 1)
    ids = torch.zeros(3, 50, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(
        (torch.cat([prefix[0], prompt(10, seed=3)[0]]), torch.cat([prefix[0], prompt(4, seed=4)[0]]), prefix[0, :37])
    ):
        ids[row, 50 - len(own) :], mask[row, 50 - len(own) :] = own, 1
    with pikv_ds.attach(model, {"page_size": 4}):
        expected = generate(model, ids, mask)
    tokens = Tokens(model)
    with pikv_ds.attach(model, block()) as cache:
        generate(model, first)
        tokens.columns.clear()
        got = generate(model, ids, mask)
        assert tokens.columns[0] == 10
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-5)
        assert cache.stats()["prefix_tokens_reused"] == 40 + 34 + 27


@torch.no_grad()
def test_a_whole_prompt_that_is_known_runs_one_token():
    model, ids = tiny_model("qwen3_moe"), prompt(40, seed=1, batch=2)
    tokens = Tokens(model)
    with pikv_ds.attach(model, block()):
        first = generate(model, ids)
        tokens.columns.clear()
        second = generate(model, ids)
    assert tokens.columns[0] == 1 and torch.equal(first[0], second[0])
    torch.testing.assert_close(second[1], first[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_prompts_in_chunks_and_rows_that_are_repeated():
    model, prefix = tiny_model("qwen3_moe"), prompt(40, seed=1)
    ids = tail(prefix, 2, length=20)
    with pikv_ds.attach(model, {"page_size": 4}):
        expected = generate(model, ids)
    tokens = Tokens(model)
    with pikv_ds.attach(model, block()) as cache:
        generate(model, tail(prefix, 3), prefill_chunk_size=16)
        tokens.columns.clear()
        assert torch.equal(generate(model, ids, prefill_chunk_size=8)[0], expected[0])
        assert tokens.columns[:3] == [8, 8, 4]
        cache.begin_generation()
        held = cache.reuse(ids)
        cache.batch_repeat_interleave(2)
        both = model(ids[:, held:].repeat(2, 1), past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(both, expected[1][:, 0].repeat(2, 1), rtol=0, atol=1e-5)
        cache.begin_generation()
        tokens.columns.clear()
        generate(model, ids)
        assert tokens.columns[0] == 1 and cache.stats()["prefix_hits"] == 3


def test_weights_that_change_after_a_forward_was_refused():
    """What was looked up for it is not used any more."""
    model, ids = tiny_model("qwen3_moe"), prompt(40, seed=1)
    with pikv_ds.attach(model, block()) as cache:
        generate(model, ids)
        with pytest.raises(UnsupportedError, match="output_attentions"):
            generate(model, ids, output_attentions=True)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        got, hits = generate(model, ids), cache.stats()["prefix_hits"]
        assert hits == 1  # of the one that was refused
    with pikv_ds.attach(model, {"page_size": 4}):
        assert torch.equal(got[0], generate(model, ids)[0])


@torch.no_grad()
def test_a_turn_of_a_chat_continues_what_was_generated():
    """The next prompt is the last one, its answer and more."""
    model, tokens = tiny_model("qwen3_moe"), None
    ids = prompt(40, seed=1)
    with pikv_ds.attach(model, {"page_size": 4}):
        answer = generate(model, ids)[0]
        longer = torch.cat([answer, prompt(7, seed=2)], 1)
        expected = generate(model, longer)
    tokens = Tokens(model)
    with pikv_ds.attach(model, block()):
        generate(model, ids)
        tokens.columns.clear()
        got = generate(model, longer)
    assert tokens.columns[0] == 7 + 1  # the last token of an answer has not been run
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_beams_begin_as_a_parked_row_and_are_parked(options):
    model, prefix = tiny_model("qwen3_moe"), prompt(40, seed=1)
    asked = [tail(prefix, seed) for seed in (2, 3)]
    with pikv_ds.attach(model, {"page_size": 4}):
        expected = [generate(model, ids, **options)[0] for ids in asked]
    with pikv_ds.attach(model, block()) as cache:
        for ids, sequences in zip(asked, expected, strict=True):
            assert torch.equal(generate(model, ids, **options)[0], sequences)
        assert cache.stats()["prefix_hits"] == options["num_beams"]


@torch.no_grad()
def test_the_budget_is_kept_and_bytes_come_back():
    model = tiny_model("qwen3_moe")
    with pikv_ds.attach(model, block(budget_tokens=64)) as cache:
        bytes_parked = []
        for seed in range(5):
            generate(model, prompt(40, seed=seed))
            stats = cache.stats()
            assert stats["prefix_tokens_parked"] <= 64
            bytes_parked.append(stats["kv_bytes_parked"])
        assert bytes_parked[0] == 0 and max(bytes_parked[2:]) <= 1.2 * bytes_parked[2]
        cache.reset()
        assert cache.stats()["kv_bytes_parked"] == cache.stats()["rows_parked"] == 0
        generate(model, prompt(40, seed=4))
        assert cache.stats()["prefix_hits"] == 0


@torch.no_grad()
def test_a_loop_of_ones_own_runs_what_is_not_stored():
    model, prefix = tiny_model("qwen3_moe"), prompt(40, seed=1)
    ids = tail(prefix, 2)
    expected = model(ids).logits
    with pikv_ds.attach(model, block()) as cache:
        model(tail(prefix, 3))
        cache.begin_generation()
        held = cache.reuse(ids)
        assert held == 40
        logits = model(ids[:, held:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, 40:], rtol=0, atol=1e-5)


def test_weights_that_have_changed_since_are_run_again():
    model, ids = tiny_model("qwen3_moe"), prompt(40, seed=1)
    with pikv_ds.attach(model, block()) as cache:
        generate(model, ids)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        got = generate(model, ids)
        assert cache.stats()["prefix_hits"] == 0
    with pikv_ds.attach(model, {"page_size": 4}):
        assert torch.equal(got[0], generate(model, ids)[0])


def test_a_forward_in_train_mode_ends_what_was_stored_before():
    """Optimizers may write weights in ways that leave no trace on them."""
    model, ids = tiny_model("qwen3_moe"), prompt(40, seed=1)
    with pikv_ds.attach(model, block()) as cache:
        generate(model, ids)
        model.train()
        model(ids, use_cache=False).logits.sum().backward()
        for parameter in model.parameters():
            parameter.data -= 0.01 * torch.ones_like(parameter)
        model.eval()
        got = generate(model, ids)
        assert cache.stats()["prefix_hits"] == 0
    with pikv_ds.attach(model, {"page_size": 4}):
        assert torch.equal(got[0], generate(model, ids)[0])


@torch.no_grad()
@pytest.mark.parametrize("what", ["embeddings", "places", "mask"])
def test_what_ids_alone_do_not_say_is_not_kept(what):
    model, ids = tiny_model("qwen3_moe"), prompt(40, seed=1)
    with pikv_ds.attach(model, block()) as cache:
        if what == "embeddings":
            model(inputs_embeds=model.get_input_embeddings()(ids))
        elif what == "places":
            model(ids, position_ids=torch.arange(3, 43)[None])
        else:
            model(ids, attention_mask=torch.full((1, 1, 40, 40), torch.finfo(torch.float32).min).triu(1))
        cache.begin_generation()
        generate(model, tail(ids, 2))
        assert cache.stats()["prefix_hits"] == 0 and cache.stats()["rows_parked"] == 0


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"compression": {"method": "svd", "rank": 8}}, "prefix-no-request-bases"),
        ({"scheduling": {"method": "streaming_llm", "budget_tokens": 512}}, "prefix-keeps-all"),
        ({"compression": {"method": "int8", "raw_recent_tokens": 128}}, "prefix-one-pool"),
        ({"storage": {"rebalance": {}}}, "prefix-stays-where-it-is"),
        ({"routing": {"method": "bounds", "budget_pages": 64}}, "prefix-no-learning-router"),
    ],
)
def test_what_does_not_combine_is_refused(given, rule):
    with pytest.raises(ConfigError) as error:
        pikv_ds.PiKVConfig(**given | {"storage": {"prefix": ON} | given.get("storage", {})})
    assert rule in str(error.value.rule), error.value


def test_models_whose_state_can_not_go_back_are_refused():
    with pytest.raises(ConfigError, match="sliding window") as error:
        pikv_ds.attach(tiny_model("gpt_oss"), block())
    assert error.value.rule == "prefix-no-windows"
    with pytest.raises(ConfigError, match="recurrence"):
        pikv_ds.attach(tiny_model("qwen3_next"), block())


def test_packed_forwards_name_their_rows_themselves():
    from pikv_ds.adapters.hf.packed import Rows

    with pikv_ds.attach(tiny_model("qwen3_moe"), block()) as cache, pytest.raises(UnsupportedError, match="packed"):
        with cache.packed(Rows([-1], [0], [3])):
            pass
