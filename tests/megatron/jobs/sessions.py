"""Sessions that transformers' side has saved, in a static context of the same model. Arguments: the folder, a layout tp,ep,etp."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pikv_ds.errors import SessionError
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, disable_pikv, enable_pikv
from pikv_ds.megatron_patch.hf_config import build_gpt
from pikv_ds.megatron_patch.hf_weights import load_hf_weights
from tests import tiny_models
from tests.dist.jobs.failures import expect
from tests.dist.jobs.sessions import block
from tests.megatron.layouts import each_layout
from tests.megatron.runs import step

FOLDER = Path(sys.argv[1])


def greedy(model, context, turn: torch.Tensor, tokens: int) -> list[int]:
    """What follows a conversation [1, T], of which the context holds the beginning."""
    made = []
    with torch.no_grad():
        logits = step(model, context, turn[:, context.sequence_len_offset :])
        for _ in range(tokens):
            made.append(int(logits.argmax(-1)))
            logits = step(model, context, torch.tensor([[made[-1]]]))
    return made


def check(report, layout: str) -> None:
    hf = tiny_models.tiny_model("qwen3_moe")
    model = build_gpt(hf.config, max_sequence_length=256, **cpu_compat.cpu_config_options()).eval()
    load_hf_weights(model, hf.config, hf.state_dict())
    for name in ("exact", "h2o"):
        known = json.loads((FOLDER / f"{name}.json").read_text())
        turn, expected = torch.tensor(known["turn"]), known["expected"][0][len(known["turn"][0]) :]
        enable_pikv(model, block(name))
        with report.check(f"load {name}") as row:
            context = PiKVInferenceContext(1, 256, model=model)
            context.load(FOLDER / f"{name}.session")
            assert context.sequence_len_offset == turn.shape[1] - 8
            got = greedy(model, context, turn, len(expected))
            row["stats"] = {key: value for key, value in context.stats().items() if key.startswith("entries")}
            assert got == expected, (got, expected)
        if name == "exact":
            with report.check("and back"):
                context.load(FOLDER / "exact.session")
                again = FOLDER / f"from megatron {layout}.session"
                context.save(again, {"from": "megatron"})
                dist.barrier()
                context.reset()
                assert context.load(again) == {"from": "megatron"}
                assert greedy(model, context, turn, len(expected)) == expected
            with report.check("another model"):
                small = PiKVInferenceContext(1, 64, model=model)
                with expect(SessionError, "make a larger one"):
                    small.load(FOLDER / "exact.session")
                weight = context.layers[1].attention.linear_qkv.weight
                with torch.no_grad():
                    weight.mul_(1.5)
                    with expect(SessionError, "the key projection of layer 1"):
                        context.load(FOLDER / "exact.session")
                    weight.div_(1.5)
        context.free()
        disable_pikv(model)


if __name__ == "__main__":
    each_layout(check, sys.argv[2:])
