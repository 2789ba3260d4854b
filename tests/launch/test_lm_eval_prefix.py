"""lm-eval's model with storage.prefix: the scores of each request alone, and shots that are run once."""

import json

import pytest
import torch

from pikv_ds import bundled
from tests.launch.lm_eval_styles import TEXT, Style, answers, assert_equal, likely, texts, until
from tests.launch.test_lm_eval import TOLERANCE, model_of

SHOTS = TEXT[:700]
ASKED = [f"{SHOTS}{TEXT[at : at + 90]}" for at in (1000, 1500, 2100)]
STYLE = Style(
    asked=[
        likely(*((prompt, option) for prompt in ASKED for option in (" the battle of", " the film", " a"))),
        texts(*ASKED, **until("\n")),
    ],
    batch=1,
)


def columns(lm) -> list[int]:
    run: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda module, args, given: run.append((args[0] if args else given["input_ids"]).numel()), with_kwargs=True
    )
    return run


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_scores_from_fewer_tokens(batch):
    args = {"pretrained": str(bundled.model_path()), "dtype": "float32", "batch_size": batch}
    found, run = {}, {}
    for name, prefix in (("off", {}), ("on", {"storage": {"prefix": {"enabled": True}}})):
        lm = model_of("pikv_ds")(**args, config=json.dumps({"page_size": 16, **prefix}))
        run[name] = columns(lm)
        found[name] = answers(lm, STYLE)
    assert_equal(found["on"], found["off"], TOLERANCE)
    assert all(torch.isfinite(torch.tensor([score for score, _ in found[name][0]])).all() for name in found)
    assert sum(run["on"]) < 0.6 * sum(run["off"]), {name: sum(each) for name, each in run.items()}
