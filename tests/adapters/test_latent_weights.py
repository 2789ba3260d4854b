"""Latent attention (DeepSeek-V2/V3) whose kv_b_proj is more than its weight: exact as with the model's own eager attention, or refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pikv_ds
from pikv_ds.errors import UnsupportedError
from tests.tiny_models import prompt, tiny_model

IDS = prompt(16, 2, batch=2)


class Around(nn.Module):
    """A wrapper, as PEFT's: `weight` is that of the base."""

    def __init__(self, base: nn.Linear, std: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.base, self.on = base, True
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=generator) * std)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * std)

    weight = property(lambda self: self.base.weight)

    def forward(self, x):
        return self.base(x) + self.added(x) if self.on else self.base(x)

    def added(self, x):
        return 2 * (x @ self.a.T) @ self.b.T


class Squared(Around):
    def added(self, x):
        return super().added(x) * x.square().mean(-1, keepdim=True)


class Shifted(Around):
    def added(self, x):
        return self.b[:, 0]


class Packed(nn.Module):
    """4-bit weights in groups, as GPTQ packs them: no float weight at all."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (base.weight.detach() / scale).round().clamp(-8, 7).to(torch.int32) + 8
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("scales", scale)
        self.register_buffer("qweight", sum(codes[:, i::8] << 4 * i for i in range(8)).to(torch.int32))

    def forward(self, x):
        codes = torch.stack([self.qweight >> 4 * i & 15 for i in range(8)], -1).flatten(1) - 8
        return x @ (codes * self.scales).T


class Low(nn.Module):
    def forward(self, weight):
        return weight.tril(3)


def wrapped(family: str, make) -> nn.Module:
    model = tiny_model(family)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = make(layer.self_attn.kv_b_proj)
    return model


@torch.no_grad()
def steps(model, ids=IDS, between=None) -> torch.Tensor:
    """Logits of a prefill of 12 columns and a step for each further one; `between` is called before the third step."""
    out = model(ids[:, :12])
    logits = [out.logits[:, -1]]
    for i in range(12, ids.shape[1]):
        if i == 14 and between is not None:
            between(model)
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values)
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


def switch(model, on: bool) -> None:
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.on = on


def hooked(base):
    base.register_forward_hook(lambda module, args, out: out * 1.5)
    return base


def parametrised(base):
    parametrize.register_parametrization(base, "weight", Low())
    return base


@pytest.mark.parametrize(("family", "make"), [
    ("deepseek_v2", lambda base: Around(base, 0.3)),
    ("deepseek_v3", lambda base: Around(base, 0.005)),
    ("deepseek_v3", Packed),
    ("deepseek_v3", hooked),
    ("deepseek_v3", parametrised),
], ids=["much", "little", "packed", "hook", "parametrised"])  # fmt: skip
def test_what_the_module_does(family, make):
    model = wrapped(family, make)
    expected = steps(model)
    with pikv_ds.attach(model, {"page_size": 4}):
        torch.testing.assert_close(steps(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("late", [False, True], ids=["between conversations", "within one"])
def test_switched_on_later(late):
    model = wrapped("deepseek_v3", lambda base: Around(base, 0.3))
    turn_on = lambda model: switch(model, True)  # noqa: E731
    switch(model, not late)
    expected = steps(model, between=turn_on)
    switch(model, False)
    with pikv_ds.attach(model, {"page_size": 4}):
        unlike = steps(model)
        switch(model, not late)
        torch.testing.assert_close(steps(model, between=turn_on), expected, rtol=0, atol=1e-5)
    assert (unlike - expected).abs().max() > 0.1


def test_merged_and_changed_in_place():
    def merge(model):
        for layer in model.model.layers:
            around = layer.self_attn.kv_b_proj
            around.base.weight.data += 2 * around.b.data @ around.a.data
            layer.self_attn.kv_b_proj = around.base

    def scale(model):
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.data *= 1.5

    for change, make in ((merge, lambda base: Around(base, 0.3)), (scale, lambda base: base)):
        expected = steps(wrapped("deepseek_v3", make), between=change)
        model = wrapped("deepseek_v3", make)
        with pikv_ds.attach(model, {"page_size": 4}):
            torch.testing.assert_close(steps(model, between=change), expected, rtol=0, atol=1e-5)


def test_replaced_by_a_copy_shared_between_layers():
    model = tiny_model("deepseek_v3")
    shared = Around(model.model.layers[0].self_attn.kv_b_proj, 0.3)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = shared
    expected = steps(model)
    with pikv_ds.attach(model, {"page_size": 4}):
        torch.testing.assert_close(steps(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [Squared, Shifted])
def test_what_is_not_linear_is_refused_also_when_it_comes_later(make):
    model = wrapped("deepseek_v3", lambda base: make(base, 0.3))
    switch(model, False)
    with pikv_ds.attach(model, {"page_size": 4}):
        steps(model)
        with pytest.raises(UnsupportedError, match="layer 0: DeepseekV3Attention does not expand its latent as kv_b_proj"):
            steps(model, between=lambda model: switch(model, True))
        switch(model, False)
        steps(model)


def test_rows_with_adapters_of_their_own_are_refused():
    class PerRow(Around):
        def added(self, x):
            return torch.stack([super(PerRow, self).added(row) * (i + 1) for i, row in enumerate(x)])

    model = wrapped("deepseek_v3", lambda base: PerRow(base, 0.3))
    with pytest.raises(UnsupportedError, match="does not expand its latent"):
        pikv_ds.attach(model, {})
    with pikv_ds.attach(model, {"probe": "never"}), pytest.raises(UnsupportedError, match="does not expand its latent"):
        steps(model)


def test_bfloat16():
    """Beside fp32, as far from it as the model's own attention."""
    exact = steps(wrapped("deepseek_v3", lambda base: Around(base, 0.3)))
    model = wrapped("deepseek_v3", lambda base: Around(base, 0.3)).bfloat16()
    own = (steps(model).float() - exact).square().mean().sqrt()
    with pikv_ds.attach(model, {"page_size": 4}):
        assert (steps(model).float() - exact).square().mean().sqrt() < 1.5 * own
