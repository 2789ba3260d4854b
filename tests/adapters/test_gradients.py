"""loss.backward() through an attached model in eval mode: the gradients of plain transformers, or a refusal when backward is called."""

import pytest
import torch

import pikv_ds
from pikv_ds.errors import UnsupportedError
from tests.tiny_models import FAMILIES, prompt, tiny_model

BLOCK = {"page_size": 4}
INT8, SVD = {"page_size": 64, "compression": {"method": "int8"}}, {"compression": {"method": "svd", "rank": 8}}
ROUTING = {"method": "bounds", "budget_pages": 3, "sink_tokens": 4, "recent_tokens": 4}


def loss_of(model, prefix, suffix, masks=(None, None), cached=torch.no_grad) -> torch.Tensor:
    past = None
    if prefix is not None:
        with cached():
            past = model(prefix, attention_mask=masks[0]).past_key_values
    logits = model(suffix, attention_mask=masks[1], past_key_values=past).logits
    return logits.log_softmax(-1)[..., 7].sum()


def gradients(model, *args, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model, *args, **kwargs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, plain, rtol=1e-4):
    assert got.keys() == plain.keys()
    for name, want in plain.items():
        error = (got[name] - want).norm() / want.norm().clamp_min(1e-6)
        assert error < rtol, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_next"])  # plain ones write its states in place
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 9), (14, 9), (14, 1)], ids=["one forward", "chunk after prefix", "token after prefix"])
def test_every_parameter(family, prefix, suffix):
    model = tiny_model(family)
    ids = prompt(prefix, seed=2, batch=2) if prefix else None, prompt(suffix, seed=9, batch=2)
    plain = gradients(model, *ids)
    with pikv_ds.attach(model, BLOCK):
        assert_close(gradients(model, *ids), plain)


def test_left_padding():
    model, long = tiny_model("mixtral"), torch.ones(2, 20, dtype=torch.int64)
    long[1, :5] = 0
    ids, masks = (prompt(12, seed=2, batch=2), prompt(8, seed=9, batch=2)), (long[:, :12], long)
    plain = gradients(model, *ids, masks=masks)
    with pikv_ds.attach(model, BLOCK):
        assert_close(gradients(model, *ids, masks=masks), plain)


@pytest.mark.parametrize("suffix", [1, 5])
def test_pages_of_shards_and_a_raw_window(suffix):
    """A raw window as long as the request: pages behind it are empty, and its own entry is raw."""
    model = tiny_model("qwen3_moe")
    block = {"storage": {"num_shards": 4}, "compression": {"method": "int8", "raw_recent_tokens": 64}}
    ids = prompt(12, seed=2), prompt(suffix, seed=9)
    plain = gradients(model, *ids)
    with pikv_ds.attach(model, block):
        assert_close(gradients(model, *ids), plain)


@pytest.mark.parametrize("suffix", [1, 5])
def test_a_choice_that_reads_everything(suffix):
    model = tiny_model("qwen3_moe")
    block = BLOCK | {"routing": {"method": "bounds", "budget_pages": 32}}
    ids = prompt(12, seed=2), prompt(suffix, seed=9)
    plain = gradients(model, *ids)
    with pikv_ds.attach(model, block):
        assert_close(gradients(model, *ids), plain)


@pytest.mark.parametrize(
    "block",
    [
        {"page_size": 64, "compression": {"method": "int4"}},
        {"routing": ROUTING},
    ],
    ids=str,
)
def test_the_derivative_of_what_was_computed(block):
    """Where plain transformers compute something else: central differences of the attached model itself."""
    model, ids = tiny_model("qwen3_moe"), (prompt(24, seed=2), prompt(5, seed=9))
    weight = model.model.layers[1].self_attn.q_proj.weight
    with pikv_ds.attach(model, BLOCK | block):
        got = gradients(model, *ids)["model.layers.1.self_attn.q_proj.weight"]
        direction, step, values = got / got.norm(), 2e-2, []
        with torch.no_grad():
            for sign in (1, -1):
                weight += sign * step * direction
                values.append(loss_of(model, *ids).double())
                weight -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(slope - got.norm()) < 0.02 * got.norm(), (slope, got.norm())


def test_many_suffixes_after_one_prefix():
    """Each forward records a graph, and a crop takes its tokens back before the next."""
    model, prefix = tiny_model("qwen3_moe"), prompt(12, seed=2)
    suffixes = [prompt(length, seed=length) for length in (6, 1, 3)]
    plain = [gradients(model, prefix, suffix) for suffix in suffixes]
    with pikv_ds.attach(model, BLOCK) as cache:
        with torch.no_grad():
            model(prefix)
        for suffix, want in zip(suffixes, plain, strict=True):
            model.zero_grad(set_to_none=True)
            model(suffix, past_key_values=cache).logits.log_softmax(-1)[..., 7].sum().backward()
            assert_close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, want)
            cache.crop(-suffix.shape[1])


def test_backward_after_the_cache_has_moved_on():
    model, ids = tiny_model("qwen3_moe"), (prompt(12, seed=2), prompt(5, seed=9))
    plain = gradients(model, *ids)
    with pikv_ds.attach(model, BLOCK) as cache:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, *ids)
        with torch.no_grad():
            model(prompt(40, seed=3))
        cache.reset()
        loss.backward()
    assert_close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, plain)


def test_inputs_embeds_of_a_frozen_model():
    model = tiny_model("deepseek_v3").requires_grad_(False)

    def gradient():
        with torch.no_grad():
            past = model(prompt(12, seed=2)).past_key_values
        given = model.get_input_embeddings()(prompt(4, seed=9)).detach().requires_grad_()
        model(inputs_embeds=given, past_key_values=past).logits.log_softmax(-1)[..., 7].sum().backward()
        return {"inputs_embeds": given.grad}

    plain = gradient()
    with pikv_ds.attach(model, BLOCK):
        assert_close(gradient(), plain)


# ---- refused, when backward is called ----------------------------------------------------------------------------------------------


def test_a_prefix_with_a_graph_is_refused():
    """Plain transformers would go on into the prefix. The forward itself is served."""
    model, ids = tiny_model("qwen3_moe"), (prompt(12, seed=2), prompt(5, seed=9))
    plain = loss_of(model, *ids)
    with pikv_ds.attach(model, BLOCK):
        loss = loss_of(model, *ids, cached=torch.enable_grad)
        torch.testing.assert_close(loss, plain)
        with pytest.raises(UnsupportedError, match=r"earlier forward that recorded a graph.*torch.no_grad"):
            loss.backward()


@pytest.mark.parametrize("block", [INT8, SVD], ids=str)
def test_a_token_that_reads_itself_in_codes_is_refused(block):
    model = tiny_model("qwen3_moe")
    ids = (prompt(12, seed=2) if block is INT8 else None), prompt(1, seed=9)
    with pikv_ds.attach(model, BLOCK | block):
        loss = loss_of(model, *ids)
        with pytest.raises(UnsupportedError, match="backward through attention over a PiKV cache.*two tokens or more"):
            loss.backward()


def test_second_derivatives_are_refused():
    model, ids = tiny_model("qwen3_moe"), (prompt(12, seed=2), prompt(5, seed=9))
    weight = model.model.layers[1].self_attn.q_proj.weight
    with pikv_ds.attach(model, BLOCK):
        (first,) = torch.autograd.grad(loss_of(model, *ids), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
