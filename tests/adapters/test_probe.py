"""Models whose attention or weights are not plain: as transformers runs them, or refused by name; and the probe leaves no trace."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

import pikv_ds
from pikv_ds.adapters.hf.anatomy import find_attentions
from pikv_ds.adapters.hf.argument_names import IN_GENERATE
from pikv_ds.errors import ConfigError, UnsupportedError
from tests.adapters.test_latent_weights import Around, Low, Packed, steps
from tests.survey.configs import tiny_config
from tests.survey.configs import tiny_model as survey_model
from tests.tiny_models import prompt, tiny_model


class LengthAttention(qwen3.Qwen3MoeAttention):
    """Sharper the more keys it is given: through PiKV these are only the new ones."""

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = qwen3.apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = kwargs.pop(IN_GENERATE, None)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = qwen3.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, qwen3.eager_attention_forward)
        scale = self.scaling * key.shape[2] ** 0.5
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=scale, sliding_window=None, **kwargs)
        return self.o_proj(out.flatten(2)), weights


def become(kind):
    def change(attention: nn.Module) -> None:
        attention.__class__ = kind

    return change


def replaced(make, *names):
    def change(attention: nn.Module) -> None:
        for name in names:
            setattr(attention, name, make(getattr(attention, name)))

    return change


def low(base: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(base, "weight", Low())
    return base


def copied(attention: nn.Module) -> None:
    attention.k_proj = copy.deepcopy(attention.v_proj)
    attention.v_proj = attention.k_proj


def hook(attention: nn.Module) -> None:
    attention.k_proj.register_forward_hook(lambda module, args, out: out * 1.5)


def other_scale(attention: nn.Module) -> None:
    attention.scaling *= 3


def frozen(attention: nn.Module) -> None:
    attention.requires_grad_(False)


def biased(attention: nn.Module) -> None:
    forward = attention.forward

    def with_bias(*args, **kwargs):
        output, weights = forward(*args, **kwargs)
        return output + 0.5, weights

    attention.forward = with_bias


def halved(attention: nn.Module) -> None:
    forward = attention.q_proj.forward
    attention.q_proj.forward = lambda x: forward(x) / 2


SERVED = {
    "adapters": replaced(lambda base: Around(base, 0.2), "q_proj", "k_proj", "v_proj", "o_proj"),
    "packed": replaced(Packed, "k_proj", "v_proj"),
    "parametrised": replaced(low, "k_proj"),
    "copied and tied": copied,
    "hook": hook,
    "another scale": other_scale,
    "hidden bias": biased,
    "frozen": frozen,
    "forward replaced": halved,
}


def changed(change, family: str = "qwen3_moe") -> nn.Module:
    model = tiny_model(family)
    for attention in find_attentions(model):
        change(attention)
    return model


@pytest.mark.parametrize("name", SERVED)
def test_served(name):
    model = changed(SERVED[name])
    expected = steps(model)
    with pikv_ds.attach(model, {"page_size": 4, "probe": "always"}):
        torch.testing.assert_close(steps(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("probe", ["auto", "always"])
def test_attention_that_pikv_does_not_reproduce_is_refused(probe):
    model = changed(become(LengthAttention))
    expected = steps(model)
    before = trace_of(model)
    with pytest.raises(UnsupportedError, match=r"layer 0 \(LengthAttention\) computes something else than PiKV reproduces"):
        pikv_ds.attach(model, {"probe": probe})
    assert trace_of(model) == before
    torch.testing.assert_close(steps(model), expected, rtol=0, atol=0)
    with pikv_ds.attach(model, {"probe": "never"}) as cache:
        assert (steps(model) - expected).abs().max() > 1e-2
        assert cache.stats()["probe_s"] == 0


def trace_of(model: nn.Module) -> dict:
    """What a probe could leave behind."""
    return {
        "random": torch.get_rng_state().tolist(),
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        "forwards": [name for name, module in model.named_modules() if "forward" in module.__dict__],
        "buffers": {name: (id(buffer), buffer._version, buffer.sum().item()) for name, buffer in model.named_buffers()},
        "numbers": [{key: value for key, value in module.__dict__.items() if isinstance(value, int | float)} for module in model.modules()],
        "attention": model.config._attn_implementation,
    }


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_probe_leaves_no_trace(training):
    model, calls = tiny_model("qwen3_moe", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), []
    for module in model.modules():
        module.register_forward_hook(lambda *args: calls.append(args))
        module.register_forward_pre_hook(lambda *args: calls.append(args))
    model.train(training)
    model.model.layers[0].self_attn.eval()
    before = trace_of(model)
    with pikv_ds.attach(model, {"probe": "always"}) as cache:
        assert 0 < cache.stats()["probe_s"] < 1
    assert trace_of(model) == before and not calls


@pytest.mark.parametrize("family", ["afmoe", "bamba"])
def test_attention_and_layers_of_other_forms(family):
    """Attention that views what it is given as one, and layers that return pairs."""
    model = survey_model(tiny_config(family))
    expected = steps(model)
    with pikv_ds.attach(model, {"probe": "always"}) as cache:
        assert cache.stats()["probe_s"] > 0
        torch.testing.assert_close(steps(model), expected, rtol=0, atol=1e-5)


def test_what_is_plain_is_not_probed_unless_asked():
    with pikv_ds.attach(tiny_model("qwen3_moe"), {}) as cache:
        assert cache.stats()["probe_s"] == cache.new_cache().stats()["probe_s"] == 0
    with pytest.raises(ConfigError, match="pikv.probe = 'sometimes': legal is one of 'auto', 'always', 'never'"):
        pikv_ds.attach(tiny_model("qwen3_moe"), {"probe": "sometimes"})


def test_adapters_that_are_switched_in_a_conversation():
    model = changed(SERVED["adapters"])

    def switch(on):
        for module in model.modules():
            if isinstance(module, Around):
                module.on = on

    switch(False)
    expected = steps(model, between=lambda model: switch(True))
    switch(False)
    with pikv_ds.attach(model, {"page_size": 4}):
        torch.testing.assert_close(steps(model, between=lambda model: switch(True)), expected, rtol=0, atol=1e-5)


def test_a_layer_that_does_not_run_as_others_do_is_refused_and_can_be_let_through():
    class Skips(qwen3.Qwen3MoeDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            return hidden_states * 0.5 if hidden_states.shape[1] == 2 else super().forward(hidden_states, **kwargs)

    model = tiny_model("qwen3_moe")
    model.model.layers[1].__class__ = Skips
    with pytest.raises(UnsupportedError, match="Skips does not call its attention module.*'probe': 'never' attaches"):
        pikv_ds.attach(model, {"probe": "always"})
    pikv_ds.attach(model, {}).detach()


def test_weights_that_nothing_loads():
    with pytest.raises(UnsupportedError, match="a Linear of the attention layers has weights on meta and nothing that loads them"):
        pikv_ds.attach(tiny_model("qwen3_moe").to("meta"), {})


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_offloaded_weights(family):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: it is what offloads weights")
    model = tiny_model(family)
    expected = steps(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pikv_ds.attach(model, {"page_size": 4}):
        assert all(weight.is_meta for weight in find_attentions(model)[0].parameters())
        torch.testing.assert_close(steps(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_peft(family):
    """On all projections; switched off and on, merged, between conversations and within one."""
    peft = pytest.importorskip("peft", reason="peft is not installed: tests of wrapped modules stand for it")
    names = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_proj", "k_proj", "v_proj"]
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(target_modules=names, r=4, init_lora_weights=False)).eval()
    changes = (None, lambda _: model.base_model.disable_adapter_layers(), lambda _: model.base_model.enable_adapter_layers(),
               lambda _: model.base_model.merge_adapter(), lambda _: model.base_model.unmerge_adapter())  # fmt: skip
    expected = [steps(model, between=change) for change in changes]
    ids = prompt(12, 3)
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    with pikv_ds.attach(model, {"page_size": 4}) as cache:
        assert cache.stats()["probe_s"] > 0
        for change, logits in zip(changes, expected, strict=True):
            torch.testing.assert_close(steps(model, between=change), logits, rtol=0, atol=2e-5)
        assert model.generate(input_ids=ids, max_new_tokens=6, do_sample=False).equal(tokens)


def torchao(model: nn.Module) -> None:
    module = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    module.quantize_(model, module.Int8WeightOnlyConfig(), filter_fn=lambda one, name: isinstance(one, nn.Linear) and "self_attn" in name)


def quanto(model: nn.Module) -> None:
    module = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    module.quantize(model, weights=module.qint8, include=["*self_attn*"])
    module.freeze(model)


def bitsandbytes(model: nn.Module) -> None:
    module = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for attention in find_attentions(model):
        for name, base in list(attention.named_children()):
            if type(base) is nn.Linear and not base.out_features % 32:  # it packs 32 rows at a time where the CPU has AVX512-BF16
                packed = module.nn.Linear4bit(base.in_features, base.out_features, bias=False, compute_dtype=torch.float32)
                packed.load_state_dict(base.state_dict())
                setattr(attention, name, packed.to("cpu").eval())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("quantise", [torchao, quanto, bitsandbytes])
def test_quantised_weights(quantise, family):
    blocks = {"q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 16} if family == "deepseek_v3" else {}  # bitsandbytes packs whole blocks
    model = tiny_model(family, **blocks)
    quantise(model)
    expected = steps(model)
    if quantise is bitsandbytes and family == "deepseek_v3" and sys.modules["bitsandbytes"].functional.has_avx512bf16():
        with pytest.raises(UnsupportedError, match="does not expand its latent as .* inputs that are quantised"):
            pikv_ds.attach(model, {"page_size": 4})  # its kv_b_proj rounds inputs of fp32 to bf16 there: no linear map is the same
        return
    with pikv_ds.attach(model, {"page_size": 4}) as cache:
        assert cache.stats()["probe_s"] > 0
        torch.testing.assert_close(steps(model), expected, rtol=0, atol=1e-5)
