"""Hook points of Megatron-Core are checked for the feature that is asked for: what is missing for one leaves the others as they are."""

from unittest import mock

import megatron.core
import pytest
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVDynamicInferenceContext, PiKVInferenceContext, version
from pikv_ds.megatron_patch.version import FEATURES, TESTED, check_feature


@pytest.fixture
def without_block_buffer(monkeypatch):
    """A Megatron-Core whose dynamic context allocates its blocks in a way that nobody has seen yet."""
    for name in ("_allocate_memory_buffer", "allocate_all_tensors"):
        monkeypatch.delattr(DynamicInferenceContext, name, raising=False)


def test_the_installed_version_is_a_tested_one_and_has_every_hook_point(recwarn):
    assert megatron.core.__version__ in TESTED
    for feature in FEATURES:
        check_feature(feature)
    assert not [w for w in recwarn if "PiKV" in str(w.message)]


def test_what_one_feature_misses_is_named_and_the_others_are_served(without_block_buffer):
    for feature in FEATURES:
        if feature != "dynamic batching":
            check_feature(feature)
    message = (
        f"megatron-core {megatron.core.__version__} cannot serve dynamic batching: DynamicInferenceContext._allocate_memory_buffer is gone"
    )
    with pytest.raises(UnsupportedError, match=f"^{message}.* and DynamicInferenceContext.allocate_all_tensors is gone, .*0.19.2"):
        PiKVDynamicInferenceContext(model=None)


def test_static_batching_alone(monkeypatch):
    monkeypatch.setattr(StaticInferenceContext, "swap_key_value_dict", lambda self: None)
    with pytest.raises(
        UnsupportedError, match=r"static batching: StaticInferenceContext.swap_key_value_dict takes \(self\), .*\(self, batch_idx, "
    ):
        PiKVInferenceContext(1, 8, model=None)
    check_feature("dynamic batching")


def test_a_module_that_is_gone(monkeypatch):
    monkeypatch.setitem(FEATURES, "more", (version.Hook("inference.gone:Thing", "call", ("self",)),))
    with pytest.raises(UnsupportedError, match="cannot serve more: Thing.call is gone"):
        check_feature("more")


def test_versions_outside_the_tested_range():
    with mock.patch.object(megatron.core, "__version__", "0.15.9"), pytest.raises(UnsupportedError, match="0.15.9 is older than 0.16"):
        check_feature("static batching")
    with mock.patch.object(megatron.core, "__version__", "0.20.0rc1"), pytest.warns(UserWarning, match="0.20.0rc1 is newer than .*0.19.2"):
        check_feature("static batching")
