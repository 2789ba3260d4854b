"""The transformers registry shim: applied only where needed, and undone."""

import pytest
from transformers.utils import output_capturing

from pikv_ds.adapters.deepspeed import autoep_shim
from tests.tiny_models import tiny_model

METHODS = ("get", "__setitem__")
takes_models = pytest.mark.skipif(
    not hasattr(output_capturing, "_CanRecordRegistry"), reason="before transformers 5.23 the registry is a dict of names: nothing to shim"
)


def registry_methods(registry):
    return {name: vars(registry)[name] for name in METHODS}


@takes_models
def test_registry_of_the_pinned_transformers_needs_it_and_gets_it_back():
    registry = output_capturing._CanRecordRegistry
    before = registry_methods(registry)
    assert autoep_shim.shim_needed()
    with autoep_shim.registry_shim():
        assert registry_methods(registry) != before
        with autoep_shim.registry_shim():
            pass
        assert registry_methods(registry) != before, "an inner use must not undo the outer one"
    assert registry_methods(registry) == before


@takes_models
def test_shim_is_undone_after_an_error():
    before = registry_methods(output_capturing._CanRecordRegistry)
    try:
        with autoep_shim.registry_shim():
            raise RuntimeError("AutoEP failed")
    except RuntimeError:
        pass
    assert registry_methods(output_capturing._CanRecordRegistry) == before


def test_registry_that_takes_names_is_left_alone(monkeypatch):
    class NamedRegistry(dict):
        def get(self, model, default=None):
            return dict.get(self, model, default)

    monkeypatch.setattr(output_capturing, "_CanRecordRegistry", NamedRegistry, raising=False)
    before = dict(vars(NamedRegistry))
    assert not autoep_shim.shim_needed() and not autoep_shim.install_shim()
    assert dict(vars(NamedRegistry)) == before
    monkeypatch.delattr(output_capturing, "_CanRecordRegistry")
    assert not autoep_shim.shim_needed() and not autoep_shim.install_shim()


@takes_models
def test_both_forms_agree_and_a_missing_name_stays_missing():
    model = tiny_model("qwen3_moe").model
    name = str(model.__class__)
    registry = output_capturing._CAN_RECORD_REGISTRY
    entry = registry.get(model)
    assert "router_logits" in entry
    with autoep_shim.registry_shim():
        assert registry.get(model) is registry.get(name) is entry
        assert registry.get("no such class", None) is None and registry.get("no such class") == {}
        registry[name] = entry
    assert "no such class" not in registry and registry.get(model) is entry
