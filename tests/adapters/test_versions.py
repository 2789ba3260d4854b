"""Which transformers is refused, which is warned of, and how the cache is called: both words, on whatever version is installed."""

import subprocess
import sys
import types
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, masking_utils

import pikv_ds
from pikv_ds.adapters.hf import argument_names, versions
from pikv_ds.adapters.hf.argument_names import IN_GENERATE, NAMES, cache_argument, cache_name, cache_of, given_cache, renamed
from pikv_ds.errors import UnsupportedError
from tests.tiny_models import prompt, tiny_model

RANGE = f"{versions.OLDEST} up to, and without, {versions.BEYOND}"


def test_an_older_version_is_refused_with_the_range():
    for installed in ("5.0.0", "5.18.0"):
        with pytest.raises(UnsupportedError, match=f"transformers {installed} is older .*{RANGE}"):
            versions.check_hook_points(installed)
    versions.check_hook_points(transformers.__version__)


def test_a_missing_hook_point_is_named(monkeypatch):
    monkeypatch.delattr(masking_utils, "sdpa_mask")
    monkeypatch.setitem(versions.HOOK_POINTS, "transformers.no_such_file", ("anything",))
    with pytest.raises(UnsupportedError) as caught:
        versions.check_hook_points("5.99.0")
    assert "has no transformers.masking_utils.sdpa_mask, transformers.no_such_file.anything, which" in str(caught.value)


def test_a_newer_version_is_warned_of_once():
    versions.warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match=f"transformers 5.99.0 is newer .*{RANGE}"):
        versions.warn_if_untested("5.99.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested("5.99.0")
        versions.warn_if_untested(transformers.__version__)


OLDER = """
import transformers
transformers.__version__ = "5.18.0"
import pikv_ds, pikv_ds.config, pikv_ds.cache.cache
try:
    pikv_ds.attach
except Exception as error:
    print(type(error).__name__, error)
"""


def test_an_older_version_is_refused_when_attach_is_asked_for_and_not_before():
    said = subprocess.run([sys.executable, "-c", OLDER], capture_output=True, text=True, timeout=120, check=True).stdout
    assert said.startswith("UnsupportedError transformers 5.18.0 is older"), said


def test_a_version_that_calls_the_cache_otherwise_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(argument_names, "NAMES", ("renamed_again",))
    with pytest.raises(UnsupportedError, match="prepare_inputs_for_generation of transformers .* takes none of renamed_again"):
        argument_names._name_in_generate()


def test_names_are_found_by_signature():
    model = tiny_model("qwen3_dense")
    assert cache_name(model.forward) == cache_name(model.model.forward) == IN_GENERATE
    assert cache_name(lambda input_ids: None) is None
    assert cache_argument(model, 3) == {IN_GENERATE: 3}
    assert cache_argument(types.SimpleNamespace(forward=lambda past_key_values: None), 3) == {"past_key_values": 3}
    with pytest.raises(UnsupportedError, match="the forward of Linear takes no"):
        cache_argument(torch.nn.Linear(1, 1), 3)
    assert renamed({"a": 1, "past_key_values": 2}, "cache", 3) == {"a": 1, "cache": 3}
    assert given_cache({"cache": None}) is None and given_cache({"past_key_values": 0, "cache": None}) == 0
    assert isinstance(cache_of(model(prompt(4, 0), use_cache=True)), DynamicCache)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_both_words_are_taken_by_forward_and_generate(name):
    model, ids, more = tiny_model("qwen3_moe"), prompt(9, 1), prompt(3, 2)
    with torch.no_grad():
        dense = DynamicCache(config=model.config)
        first, second = (model(part, **cache_argument(model, dense)).logits for part in (ids, more))
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        with pikv_ds.attach(model, {"page_size": 4}) as attached:
            cache = attached.new_cache()
            output = model(ids, **{name: cache})
            torch.testing.assert_close(output.logits, first, rtol=0, atol=1e-5)
            assert cache_of(output) is cache
            torch.testing.assert_close(model(more, **{name: cache}).logits, second, rtol=0, atol=1e-5)
            assert cache.lens == [12]
            cache = attached.new_cache()
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, **{name: cache}), tokens)
            assert cache.lens == [13]
            with pytest.raises(UnsupportedError, match="but was called with a DynamicCache"):
                model(ids, **{name: DynamicCache(config=model.config)})
            with pytest.raises(UnsupportedError, match="but was called with a DynamicCache"):
                model.generate(ids, max_new_tokens=5, **{name: DynamicCache(config=model.config)})


def test_a_cache_by_position_and_by_both_words():
    model, ids = tiny_model("qwen3_moe"), prompt(9, 1)
    with torch.no_grad(), pikv_ds.attach(model, {"page_size": 4}) as attached:
        cache = attached.new_cache()
        model.model(ids, None, None, cache)
        assert cache.lens == [9]
        with pytest.raises(UnsupportedError, match="cache and past_key_values are two names of one argument"):
            model.generate(ids, cache=cache, past_key_values=attached.new_cache())
        same = attached.new_cache()
        model.generate(ids, cache=same, past_key_values=same, max_new_tokens=2, do_sample=False)
        assert same.lens == [10]
