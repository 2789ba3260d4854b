"""Masks and positions beyond padding and counting: as plain transformers has them in the same calls, or refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import pikv_ds
from pikv_ds.errors import UnsupportedError
from tests.survey.configs import tiny_config
from tests.survey.configs import tiny_model as survey_model
from tests.tiny_models import prompt, tiny_model

TOKENS = 14


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def windows():
    return tiny_model("gpt_oss")


@torch.no_grad()
def run(model, cache, steps: list[dict]) -> list[torch.Tensor]:
    """Logits of forwards one after the other."""
    return [model(**step, past_key_values=cache, use_cache=True).logits for step in steps]


def compared(model, steps, shown=None, block=None) -> None:
    """shown: [B, T] of the first forward, the columns whose logits mean something."""
    plain = run(model, DynamicCache(config=model.config), steps)
    with pikv_ds.attach(model, block or {"page_size": 4, "storage": {"num_shards": 2}}) as cache:
        got = run(model, cache, steps)
    for i, (one, other) in enumerate(zip(got, plain, strict=True)):
        if i == 0 and shown is not None:
            one, other = one[shown], other[shown]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def steps_of(ids: torch.Tensor, cut: int, masks: list | None = None, positions: torch.Tensor | None = None) -> list[dict]:
    """A prefill of `cut` columns, then one column at a time."""
    parts = [ids[:, :cut], *ids[:, cut:].split(1, 1)]
    made, at = [], 0
    for i, part in enumerate(parts):
        step = {"input_ids": part}
        if masks is not None:
            step["attention_mask"] = masks[i]
        if positions is not None:
            step["position_ids"] = positions[..., at : at + part.shape[1]]
        made.append(step)
        at += part.shape[1]
    return made


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0, 1, 1, 2, 3, 4, 9, 9, 9, 20], list(range(9, -1, -1))], ids=str)
def test_positions_are_the_models_affair(positions, model):
    positions = torch.tensor([positions + [5, 6, 7, 8]]).expand(2, -1)
    compared(model, steps_of(prompt(TOKENS, seed=1, batch=2), 10, positions=positions))


def test_a_packed_row_with_windows(windows):
    compared(windows, steps_of(prompt(TOKENS, seed=1), 12, positions=torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7]])))


def test_positions_of_a_text_with_three_axes():
    text = survey_model(tiny_config("qwen3_5_text"))
    positions = torch.arange(TOKENS).expand(3, 2, -1) + torch.tensor([0, 1, 3])[:, None, None]
    compared(text, steps_of(prompt(TOKENS, seed=1, batch=2), 10, positions=positions))


def four(mask: torch.Tensor, kind: str) -> torch.Tensor:
    """[B, T, C + T] bool as a mask of four dimensions: bool, or added to scores."""
    if kind == "bool":
        return mask.unsqueeze(1)
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min).unsqueeze(1)


@pytest.mark.parametrize("kind", ["bool", "lowest"])
def test_four_dimensions_that_say_padding(kind, model):
    if kind == "bool":  # eager attention would add it to scores
        model = tiny_model("qwen3_moe", "sdpa")
    ids, padding = prompt(TOKENS, seed=1, batch=2), torch.ones(2, TOKENS, dtype=torch.bool)
    padding[1, :4] = False
    whole = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & padding.unsqueeze(1)
    masks = [four(whole[:, :10, :10], kind), *(four(whole[:, i : i + 1, : i + 1], kind) for i in range(10, TOKENS))]
    compared(model, steps_of(ids, 10, masks), shown=padding[:, :10])


def blocks(*sizes: int) -> torch.Tensor:
    return torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()


OWN = {
    "sequences": torch.ones(10, 10, dtype=torch.bool).tril() & blocks(4, 6),
    "an image that sees all of itself": torch.ones(10, 10, dtype=torch.bool).tril() | torch.nn.functional.pad(blocks(4), (3, 3, 3, 3)),
    "a prefix": torch.ones(10, 10, dtype=torch.bool).tril() | (torch.arange(10) < 5),
    "everything": torch.ones(10, 10, dtype=torch.bool),
}


@pytest.mark.parametrize("name", OWN)
def test_a_prefill_may_see_itself_in_any_way(name, model):
    masks = [four(OWN[name].expand(2, -1, -1), "lowest"), *(torch.zeros(2, 1, 1, i + 1) for i in range(10, TOKENS))]
    compared(model, steps_of(prompt(TOKENS, seed=2, batch=2), 10, masks))


def test_a_chunk_behind_stored_tokens_may_too(model):
    ids = prompt(TOKENS, seed=1)
    chunk = torch.cat([torch.ones(6, 8, dtype=torch.bool), blocks(3, 3).tril()], 1)
    chunk = four(chunk.unsqueeze(0), "lowest")
    compared(model, [{"input_ids": ids[:, :8]}, {"input_ids": ids[:, 8:], "attention_mask": chunk}])


def test_a_mask_can_not_hide_what_is_stored(model):
    ids, mask = prompt(TOKENS, seed=1), torch.zeros(1, 1, 1, TOKENS)
    mask[..., 3] = -torch.inf
    with (
        pikv_ds.attach(model, {"page_size": 4}) as cache,
        pytest.raises(UnsupportedError, match="13 cached columns .* can't hide or reveal"),
    ):
        run(model, cache, [{"input_ids": ids[:, :-1]}, {"input_ids": ids[:, -1:], "attention_mask": mask}])


def test_masks_that_differ_between_heads(model):
    with pikv_ds.attach(model, {}), pytest.raises(UnsupportedError, match="the same for all heads"):
        model(prompt(6, seed=1), attention_mask=torch.zeros(1, 4, 6, 6))


def test_a_mask_of_bool_that_eager_attention_would_add(model):
    with pikv_ds.attach(model, {}), pytest.raises(UnsupportedError, match="torch.bool, which eager attention would add to scores"):
        model(prompt(6, seed=1), attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


def test_a_window_over_a_mask_of_four_dimensions(windows):
    """As transformers' own layers do: among new tokens the mask alone counts, of old ones a window is left."""
    ids = prompt(TOKENS, seed=1)
    compared(windows, steps_of(ids, 10, [four(torch.ones(1, 10, 10, dtype=torch.bool).tril(), "lowest"), None, None, None, None]))


def test_padding_between_the_tokens_of_a_row(model, windows):
    ids, mask = prompt(TOKENS, seed=1, batch=2), torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 7:10] = False
    masks = [mask[:, :10], *(mask[:, : i + 1] for i in range(10, TOKENS))]
    compared(model, steps_of(ids, 10, masks), shown=mask[:, :10])
    with pytest.raises(UnsupportedError, match="hides columns between the tokens of a row.*pad rows on the left"):
        compared(windows, steps_of(ids, 10, masks), shown=mask[:, :10])


def test_a_configuration_with_a_window_that_its_masks_do_not_have():
    """Moshi's cache forgets what its attention would see: a prompt in one piece, then token by token."""
    moshi = survey_model(tiny_config("moshi", sliding_window=6))
    ids = prompt(TOKENS, seed=1)
    compared(moshi, steps_of(ids, 10))
    with pikv_ds.attach(moshi, {}) as cache, pytest.raises(UnsupportedError, match="give the prompt in one piece"):
        run(moshi, cache, [{"input_ids": ids[:, :8]}, {"input_ids": ids[:, 8:]}])


@pytest.mark.parametrize("unused", [{"use_sliding_window": False}, {"use_sliding_window": True, "max_window_layers": 1}], ids=str)
def test_windows_that_only_some_layers_use(unused):
    config = AutoConfig.for_model(
        "qwen2", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=5, **unused,
    )  # fmt: skip
    torch.manual_seed(0)
    compared(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), steps_of(prompt(TOKENS, seed=1, batch=2), 10))


def test_arguments_that_attention_has_no_use_for(model):
    step = {"input_ids": prompt(8, seed=1), "tokenizer": object(), "shift_labels": prompt(8, seed=2), "anything": torch.ones(3)}
    compared(model, [step])
