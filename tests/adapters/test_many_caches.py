"""One model, many caches: each conversation has its own, as with DynamicCache; the oracle is plain transformers, each alone."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

import pikv_ds
from pikv_ds.cache.stats import stats
from pikv_ds.errors import ConfigError, UnsupportedError
from tests.long_form import short_or_long
from tests.tiny_models import prompt, tiny_model

BLOCK = {"page_size": 4}
EVICTS = {"scheduling": {"method": "streaming_llm", "budget_tokens": 24, "recent_tokens": 4, "sink_tokens": 2}}


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe")


def greedy(model, ids, new=8, **options):
    return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, **options)


def allocated(core) -> int:
    return stats(core, 0, 0)["kv_bytes_allocated"]


@torch.no_grad()
def in_turns(model, prompts, caches, steps=6):
    """One step of each conversation in turn; the tokens of each. caches: None = the forward makes its own."""
    outs = [model(ids, past_key_values=cache) for ids, cache in zip(prompts, caches, strict=True)]
    tokens = [[out.logits[:, -1].argmax(-1, keepdim=True)] for out in outs]
    for _ in range(steps):
        for i, row in enumerate(tokens):
            outs[i] = model(row[-1], past_key_values=outs[i].past_key_values)
            row.append(outs[i].logits[:, -1].argmax(-1, keepdim=True))
    return [torch.cat(row, 1).tolist() for row in tokens]


PROMPTS = [prompt(9, 3), prompt(9, 4), prompt(14, 5, batch=2), prompt(3, 6)]


@pytest.mark.parametrize("block", [{}, EVICTS, {"compression": {"method": "int8"}}, {"storage": {"num_shards": 4}}], ids=str)
@pytest.mark.parametrize("made", ["by forwards", "new_cache", "Cache"])
def test_conversations_in_turns(model, made, block):
    block, alone = {**(BLOCK if "compression" not in block else {}), **block}, []
    for ids in PROMPTS:  # exact configurations are compared with plain transformers in other files
        with pikv_ds.attach(model, block):
            alone += in_turns(model, [ids], [None])
    if made == "Cache":
        assert in_turns(model, PROMPTS, [pikv_ds.Cache(model, block) for _ in PROMPTS]) == alone
        return
    with pikv_ds.attach(model, block) as attached:
        assert in_turns(model, PROMPTS, [attached.new_cache() if made == "new_cache" else None for _ in PROMPTS]) == alone


def test_alone_is_plain_transformers(model):
    plain = in_turns(model, PROMPTS, [None] * len(PROMPTS))
    with pikv_ds.attach(model, BLOCK):
        assert in_turns(model, PROMPTS, [None] * len(PROMPTS)) == plain


def test_four_alive_one_beam_one_speculative_one_deleted(model):
    draft = tiny_model("qwen3_moe", seed=5)
    ids = [prompt(10 + i, 20 + i) for i in range(4)]
    options = [{}, {"num_beams": 3}, {"assistant_model": draft}, {}]
    expected = [greedy(model, each, **more) for each, more in zip(ids, options, strict=True)]
    with pikv_ds.attach(model, BLOCK) as attached:
        caches = [attached.new_cache() for _ in ids]
        run = [
            lambda i, n: greedy(model, seen[i], n, past_key_values=caches[i]),
            lambda i, n: greedy(model, ids[i], 8, past_key_values=caches[i], num_beams=3) if n == 4 else seen[i],
            lambda i, n: greedy(model, ids[i], 8, past_key_values=caches[i], assistant_model=draft) if n == 4 else seen[i],
            lambda i, n: greedy(model, seen[i], n, past_key_values=caches[i]),
        ]
        seen = list(ids)
        for turn in range(2):
            for i in range(4):
                if i == 3 and turn:
                    core = caches[3].core
                    assert allocated(core)
                    caches[3] = None
                    assert allocated(core) == 0
                else:
                    seen[i] = run[i](i, 4 if not turn else expected[i].shape[1] - seen[i].shape[1])
        for i in range(3):
            assert seen[i].tolist() == expected[i].tolist(), i
        assert seen[3].tolist() == expected[3][:, :-4].tolist()
        assert all(allocated(cache.core) for cache in caches[:3])


def test_memory_comes_back_when_the_last_holder_goes(model):
    gc.disable()  # by counting references alone
    try:
        with torch.no_grad(), pikv_ds.attach(model, BLOCK) as attached:
            out = model(PROMPTS[0])
            core, cache = out.past_key_values.core, out.past_key_values
            model(PROMPTS[1])  # attached stands for this one now
            del out
            assert allocated(core)
            del cache
            assert allocated(core) == 0
            again = attached.new_cache()
            assert again.core is core, "an empty store is used again"
            again.close()
            assert allocated(core) == 0
            with pytest.raises(UnsupportedError, match="was closed"):
                model(PROMPTS[0], past_key_values=again)
    finally:
        gc.enable()


def test_generate_returns_a_cache_that_goes_on(model):
    ids, other = PROMPTS[0], PROMPTS[1]
    expected = greedy(model, ids, 12)
    with pikv_ds.attach(model, BLOCK):
        first = greedy(model, ids, 6, return_dict_in_generate=True)
        greedy(model, other, 5)
        rest = greedy(model, first.sequences, 6, past_key_values=first.past_key_values)
    assert rest.tolist() == expected.tolist()


# ---- forwards inside a generate() ------------------------------------------------------------------------------------------------


class Scores(StoppingCriteria):
    """Runs the model on the newest tokens while it generates, as self-evaluation does."""

    def __init__(self, model, length, how):
        self.model, self.length, self.how = model, length, how

    def __call__(self, ids, scores, **kwargs):
        newest = ids[:, -self.length :]
        with torch.no_grad():
            if self.how == "forward":
                self.model(newest)
            elif self.how == "generate":
                greedy(self.model, newest, 3)
            else:
                out = self.model(newest)
                self.model(newest[:, :1], past_key_values=out.past_key_values)
        return torch.zeros(ids.shape[0], dtype=torch.bool)


class Processor(LogitsProcessor):
    def __init__(self, *args):
        self.looks = Scores(*args)

    def __call__(self, input_ids, scores):
        self.looks(input_ids, scores)
        return scores


class Streamer(TextStreamer):
    def __init__(self, model):
        self.model, self.put_tokens = model, []

    def put(self, value):
        with torch.no_grad():
            self.model(value.view(1, -1))
        self.put_tokens.append(value)

    def end(self):
        with torch.no_grad():
            self.model(torch.cat([value.view(1, -1) for value in self.put_tokens], 1))


@pytest.mark.parametrize("explicit", [False, True], ids=["own", "passed"])
@pytest.mark.parametrize("how", ["forward", "generate", "two steps"])
@pytest.mark.parametrize("length", [13, 5])
def test_nested(model, length, how, explicit):
    ids = prompt(13, 2)
    options = [
        {"stopping_criteria": StoppingCriteriaList([Scores(model, length, how)])},
        {"logits_processor": LogitsProcessorList([Processor(model, length, how)])},
    ]
    expected = greedy(model, ids)
    for option in options:
        assert greedy(model, ids, **option).tolist() == expected.tolist()
        with pikv_ds.attach(model, BLOCK) as attached:
            given = {"past_key_values": attached} if explicit else {}
            assert greedy(model, ids, **option, **given).tolist() == expected.tolist()
            assert attached.columns == expected.shape[1] - 1, "it stands for the outer generation"


def test_streamer_guidance_and_negative_prompts(model):
    ids = prompt(13, 2)
    for options in ({"guidance_scale": 1.7}, {"guidance_scale": 1.7, "negative_prompt_ids": prompt(6, 9)}):
        expected = greedy(model, ids, **options)
        with pikv_ds.attach(model, BLOCK):
            assert greedy(model, ids, **options).tolist() == expected.tolist()
    expected = greedy(model, ids)
    with pikv_ds.attach(model, BLOCK):
        assert greedy(model, ids, streamer=Streamer(model)).tolist() == expected.tolist()


# ---- threads -----------------------------------------------------------------------------------------------------------------------


def in_threads(*calls):
    got = [None] * len(calls)

    def work(i):
        try:
            got[i] = calls[i]()
        except (UnsupportedError, RuntimeError) as error:
            got[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return got


def test_threads_with_caches_of_their_own(model):
    jobs = [prompt(15, 1), prompt(9, 2), prompt(4, 3)]
    expected = [greedy(model, ids, 20).tolist() for ids in jobs]
    with pikv_ds.attach(model, BLOCK):
        got = in_threads(*(lambda ids=ids: greedy(model, ids, 20).tolist() for ids in jobs))
        assert got == expected
        assert greedy(model, jobs[0], 20).tolist() == expected[0]
    assert model.config._attn_implementation == "eager"


def test_a_cache_in_use_by_another_thread_says_so(model):
    ids, inside, over = prompt(9, 2), threading.Event(), threading.Event()

    class Waits(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            inside.set()
            assert over.wait(60)
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    def intrude():
        assert inside.wait(60)
        try:
            with torch.no_grad():
                return model(ids, past_key_values=cache)
        finally:
            over.set()

    expected = greedy(model, ids).tolist()
    with pikv_ds.attach(model, BLOCK) as attached:
        cache = attached.new_cache()
        generate = lambda: greedy(model, ids, past_key_values=cache, stopping_criteria=StoppingCriteriaList([Waits()]))  # noqa: E731
        tokens, error = in_threads(generate, intrude)
        assert isinstance(error, UnsupportedError) and "in another thread" in str(error)
        assert tokens.tolist() == expected


# ---- a cache says what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_after_detach(implementation):
    model = tiny_model("qwen3_moe")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        with pikv_ds.attach(model, BLOCK) as attached:
            past, own = model(PROMPTS[0]).past_key_values, attached.new_cache()
        for cache in (past, own, attached):
            for use in (
                lambda cache: model(PROMPTS[3], past_key_values=cache),
                lambda cache: greedy(model, PROMPTS[3], past_key_values=cache),
                lambda cache: cache.stats(),
                lambda cache: cache.crop(-1),
                lambda cache: cache.get_seq_length(),
                lambda cache: cache.batch_repeat_interleave(2),
            ):
                with pytest.raises(UnsupportedError, match="the model was detached"):
                    use(cache)
            assert "was detached" in repr(cache)
        with pytest.raises(UnsupportedError, match="was detached"):
            attached.new_cache()
        assert isinstance(model(PROMPTS[0]).past_key_values, DynamicCache)


def test_of_another_model(model):
    other = tiny_model("qwen3_moe", seed=5)
    with pikv_ds.attach(model, BLOCK) as attached, torch.no_grad():
        cache = model(PROMPTS[0]).past_key_values
        with pytest.raises(UnsupportedError, match="does not run through PiKV"):
            other(PROMPTS[3], past_key_values=cache)
        with pikv_ds.attach(other, BLOCK), pytest.raises(UnsupportedError, match="belongs to another model"):
            other(PROMPTS[3], past_key_values=attached)
        with pytest.raises(UnsupportedError, match="called with a DynamicCache"):
            model(PROMPTS[3], past_key_values=DynamicCache())


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy, pickle.dumps, lambda what: torch.save(what, io.BytesIO())])
def test_copies_are_refused(model, copies):
    with pikv_ds.attach(model, BLOCK) as attached, torch.no_grad():
        for cache in (attached, attached.new_cache(), model(PROMPTS[0]).past_key_values):
            with pytest.raises(UnsupportedError, match="can't be copied"):
                copies(cache)
        if copies is not copy.copy:  # a shallow copy shares its modules, hooks and all
            with pytest.raises(UnsupportedError, match="while PiKV caches are attached"):
                copies(model)
    copies(model)


def test_saving_weights_goes_on(model, tmp_path):
    with pikv_ds.attach(model, BLOCK):
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), io.BytesIO())
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation in ("eager", "sdpa")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


# ---- what forwards without a cache get -----------------------------------------------------------------------------------------------


def test_cache_without_attach(model):
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    expected = greedy(model, PROMPTS[0]).tolist()
    cache = pikv_ds.Cache(model, BLOCK)
    with torch.no_grad():
        assert isinstance(model(PROMPTS[1]).past_key_values, DynamicCache), "only who passes it uses it"
        model(PROMPTS[1], past_key_values=DynamicCache())
    assert greedy(model, PROMPTS[0], past_key_values=cache).tolist() == expected
    core = cache.core
    assert allocated(core)
    del cache
    assert allocated(core) == 0
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    assert "generate" not in vars(model)


def test_caches_of_several_configurations(model):
    expected = greedy(model, PROMPTS[0], 12).tolist()
    with pikv_ds.attach(model, {**BLOCK, **EVICTS}):
        evicted = greedy(model, prompt(40, 8), 12).tolist()
    exact, evicts = pikv_ds.Cache(model, BLOCK), pikv_ds.Cache(model, {**BLOCK, **EVICTS})
    assert pikv_ds.Cache(model, BLOCK).core.config == exact.core.config
    with pikv_ds.attach(model, {"page_size": 8}) as attached:
        same = pikv_ds.Cache(model)
        assert same.core.config == attached.core.config
        assert greedy(model, PROMPTS[0], 12, past_key_values=exact).tolist() == expected
        assert greedy(model, prompt(40, 8), 12, past_key_values=evicts).tolist() == evicted
        assert greedy(model, PROMPTS[0], 12).tolist() == expected
    with pytest.raises(UnsupportedError, match="was detached"):
        same.stats()
    assert exact.lens == [PROMPTS[0].shape[1] + 11], "the others live on"
    assert greedy(model, torch.tensor(expected), 2, past_key_values=exact).shape[1] == len(expected[0]) + 2
    with pytest.raises(ConfigError, match="enabled"):
        pikv_ds.Cache(model, {"enabled": False})


@torch.no_grad()
def test_begin_generation_takes_nothing_from_others(model):
    ids = PROMPTS[0]
    plain = model(ids[:, -1:], past_key_values=model(ids[:, :-1]).past_key_values).logits
    with pikv_ds.attach(model, BLOCK) as attached:
        held = model(ids[:, :-1]).past_key_values
        attached.begin_generation()
        assert attached.columns == 0
        model(PROMPTS[1], past_key_values=attached)
        assert torch.allclose(model(ids[:, -1:], past_key_values=held).logits, plain, atol=1e-5)


@torch.no_grad()
def test_passed_explicitly_it_stays(model):
    ids = PROMPTS[0]
    plain = model(ids[:, -1:], past_key_values=model(ids[:, :-1]).past_key_values).logits
    with pikv_ds.attach(model, BLOCK) as attached:
        model(ids[:, :-1], past_key_values=attached)
        model(PROMPTS[1])  # another one, not this
        assert torch.allclose(model(ids[:, -1:], past_key_values=attached).logits, plain, atol=1e-5)


# ---- forwards that break off -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_others_go_on_after_a_forward_that_broke_off(model, error):
    expected = greedy(model, PROMPTS[0], 12)

    def breaks(*_):
        raise error

    with pikv_ds.attach(model, BLOCK), torch.no_grad():
        first = greedy(model, PROMPTS[0], 6, return_dict_in_generate=True)
        broken = model(PROMPTS[1]).past_key_values
        hook = model.model.layers[1].mlp.register_forward_pre_hook(breaks)
        with pytest.raises(error):
            model(PROMPTS[3][:, :1], past_key_values=broken)
        with pytest.raises(error):
            greedy(model, PROMPTS[3])
        hook.remove()
        with pytest.raises(RuntimeError, match="failed midway"):
            model(PROMPTS[3][:, :1], past_key_values=broken)
        rest = greedy(model, first.sequences, 6, past_key_values=first.past_key_values)
        assert rest.tolist() == expected.tolist()
        broken.reset()
        assert greedy(model, PROMPTS[0], 12, past_key_values=broken).tolist() == expected.tolist()
    assert model.config._attn_implementation == "eager"


def test_a_forward_inside_a_layer_ends_the_outer_one_by_name(model):
    def again(*_):
        handle.remove()
        model(PROMPTS[3])

    handle = model.model.layers[1].register_forward_pre_hook(again)
    with pikv_ds.attach(model, BLOCK), torch.no_grad():
        with pytest.raises(UnsupportedError, match="PiKV"):
            model(PROMPTS[0])
        assert model(PROMPTS[0]).logits.isfinite().all()


# ---- drafts -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"assistant_early_exit": 1}, {"assistant_early_exit": 2}, {"itself": True}], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_drafts_of_the_model_itself(family, options):
    model = tiny_model(family, num_hidden_layers=3)
    given = {"assistant_model": model} if "itself" in options else options
    expected = greedy(model, prompt(13, 2), 10, **given)
    with pikv_ds.attach(model, BLOCK) as attached:
        assert greedy(model, prompt(13, 2), 10, **given).tolist() == expected.tolist()
        assert attached.columns == expected.shape[1] - 1
    assert model.config.num_hidden_layers == 3


WATCHES = {"scheduling": {**EVICTS["scheduling"], "method": "h2o"}}
LEARNS = {"routing": {"method": "load_balanced"}}
# All layers of mixtral have windows: a budget is refused.
DRAFTS = {"exact": ("qwen3_moe", {}), "evicts": ("qwen3_moe", EVICTS), "watches": ("qwen3_moe", WATCHES), "learns": ("qwen3_moe", LEARNS)}
DRAFTS |= {"windows": ("gpt_oss", {}), "windows, evicts": ("gpt_oss", EVICTS), "windows only": ("mixtral", {})}


@pytest.mark.parametrize("threshold", short_or_long([0.0], [0.0, 0.4]))
@pytest.mark.parametrize("name", short_or_long(["evicts", "watches", "windows, evicts"], list(DRAFTS)))
def test_attached_drafts(name, threshold):
    """threshold 0: a draft is 20 forwards long, and then most of it is taken back."""
    family, block = DRAFTS[name]
    model, draft = tiny_model(family), tiny_model(family, seed=5)
    draft.generation_config.assistant_confidence_threshold = threshold
    ids = torch.cat([prompt(14, 2)] * 2, 1)
    expected = greedy(model, ids, 30)
    with pikv_ds.attach(draft, {**BLOCK, **block}):
        assert greedy(model, ids, 30, assistant_model=draft).tolist() == expected.tolist()
        with pikv_ds.attach(model, BLOCK):
            assert greedy(model, ids, 30, assistant_model=draft).tolist() == expected.tolist()


def test_a_draft_whose_prompt_has_padding_inside():
    """The model writes its padding token, which transformers then hides from the draft: with windows that is refused but for drafts."""
    model, draft = tiny_model("gpt_oss"), tiny_model("gpt_oss", seed=5)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + 2 * (torch.arange(logits.shape[-1]) == 0))
    ids = prompt(20, 2)
    expected = greedy(model, ids, 20)
    assert (expected[:, 20:-1] == 0).any() and (expected[:, 20:] != 0).any()
    assert greedy(model, ids, 20, assistant_model=draft).tolist() == expected.tolist()
    with pikv_ds.attach(draft, BLOCK):
        assert greedy(model, ids, 20, assistant_model=draft).tolist() == expected.tolist()
        with pytest.raises(UnsupportedError, match="attention_mask hides"):
            greedy(draft, expected, 2)


# ---- models without generate() ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_base_model(model):
    base, ids = model.model, PROMPTS[0]
    plain = base(ids[:, -2:], past_key_values=base(ids[:, :-2]).past_key_values).last_hidden_state
    with pikv_ds.attach(base, BLOCK):
        mine = base(ids[:, -2:], past_key_values=base(ids[:, :-2]).past_key_values).last_hidden_state
    assert torch.allclose(mine, plain, atol=1e-5)
    assert not base._forward_hooks and not base._forward_pre_hooks
