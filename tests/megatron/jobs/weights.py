"""Hugging Face models in Megatron-Core and back, sliced: same logits, same weights; the bundled model over PiKV. Arguments: layouts."""

from functools import partial

import torch

import pikv_ds.bundled
from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, disable_pikv, enable_pikv
from pikv_ds.megatron_patch.hf_config import build_gpt
from pikv_ds.megatron_patch.hf_weights import gather_hf_weights, load_hf_weights
from tests import tiny_models
from tests.dist.jobs.report import Report
from tests.megatron import documented
from tests.megatron.layouts import each_layout
from tests.megatron.runs import decode, full_forward, refused, step


def check_model(report: Report, name: str, hf, length: int, max_sequence_length: int = 512):
    ids = torch.randint(3, hf.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(11))
    model = build_gpt(hf.config, max_sequence_length=max_sequence_length, **cpu_compat.cpu_config_options()).eval()
    with report.check(f"{name} same logits") as row, torch.no_grad():
        load_hf_weights(model, hf.config, hf.state_dict())
        reference = hf(ids).logits
        row["difference"] = (full_forward(model, ids) - reference).abs().max().item()
        row["scale"] = reference.abs().max().item()
        assert row["difference"] <= 1e-4, row
    with report.check(f"{name} the way back"):
        back, original = gather_hf_weights(model, hf.config), hf.state_dict()
        assert back.keys() == original.keys(), sorted(back.keys() ^ original.keys())
        assert all(torch.equal(back[n], original[n]) for n in original)
    return model, ids


def check_layout(report: Report, layout: str) -> None:
    for name, family, changes in (
        ("qwen3_moe, dense first layer", "qwen3_moe", dict(mlp_only_layers=[0])),
        ("qwen3_moe, unnormalised", "qwen3_moe", dict(norm_topk_prob=False)),
        ("mixtral, window 8", "mixtral", {}),
        ("mixtral, one KV head", "mixtral", dict(num_key_value_heads=1)),
    ):
        check_model(report, f"{layout} {name}", tiny_models.tiny_model(family, **changes), 20)
    hf, tokenizer = pikv_ds.bundled.load()
    model, _ = check_model(report, f"{layout} bundled", hf, 64)
    with report.check(f"{layout} the documented lines"):
        made = documented.run("gather_hf_weights", hf=hf, options=cpu_compat.cpu_config_options())
        assert all(torch.equal(made["weights"][name], tensor) for name, tensor in hf.state_dict().items())
    with report.check(f"{layout} bundled finds a pass key over PiKV"):
        prompt, key = pikv_ds.bundled.passkey_prompt(tokenizer, 160, seed=2)
        ids = torch.tensor([prompt])
        enable_pikv(model)
        context, text = PiKVInferenceContext(1, 180, model=model), []
        logits = decode(model, context, ids, [159])[-1]
        reference = hf(ids).logits[:, -1]
        assert (logits - reference).abs().max() <= 1e-4
        for _ in range(8):
            token = logits.argmax(-1, keepdim=True)
            text.append(int(token))
            with torch.no_grad():
                logits = step(model, context, token)
        assert tokenizer.decode(text).strip().startswith(key), (tokenizer.decode(text), key)
        disable_pikv(model)
    with report.check(f"{layout} refusals"):
        for change in ({"model_type": "qwen2_moe"}, {"attention_bias": True}, {"hidden_act": "gelu"}):
            match = next(iter(change)) if "attention_bias" in change else next(iter(change.values()))
            config = type(hf.config)(**{**hf.config.to_dict(), **{k: v for k, v in change.items() if k != "model_type"}})
            config.model_type = change.get("model_type", config.model_type)
            refused(UnsupportedError, match, partial(build_gpt, config, max_sequence_length=64, **cpu_compat.cpu_config_options()))
        weights = dict(hf.state_dict())
        weights.pop("model.norm.weight")
        refused(UnsupportedError, "model.norm.weight", lambda: load_hf_weights(model, hf.config, weights))


if __name__ == "__main__":
    each_layout(check_layout)
