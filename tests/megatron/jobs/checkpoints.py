"""Checkpoints of an enabled model across layouts. Arguments: folder, layouts tp,ep,etp.

The first layout saves, every layout loads.
"""

import sys
from pathlib import Path

import torch
from megatron.core.transformer.enums import AttnBackend

import pikv_ds.bundled
from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, enable_pikv
from pikv_ds.megatron_patch.checkpoint import load_checkpoint, save_checkpoint
from pikv_ds.megatron_patch.hf_config import build_gpt
from pikv_ds.megatron_patch.hf_weights import load_hf_weights
from tests.dist.jobs.report import Report
from tests.megatron import documented
from tests.megatron.layouts import each_layout
from tests.megatron.megatron_lm import queue_from_a_fork
from tests.megatron.runs import decode, full_forward, refused

LENGTH = 60


def build(hf_config, **changes):
    options = {"attention_backend": AttnBackend.local, **cpu_compat.cpu_config_options(), **changes}
    return build_gpt(hf_config, max_sequence_length=512, **options).eval()


def check_layout(report: Report, layout: str, folder: Path, hf, save: bool) -> None:
    ids = torch.randint(3, hf.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        reference = hf(ids).logits
    if save:
        source = build(hf.config)
        load_hf_weights(source, hf.config, hf.state_dict())
        queue_from_a_fork()
        save_checkpoint(enable_pikv(source), folder)
    with report.check(f"{layout} loads") as row:
        model = enable_pikv(build(hf.config))
        before = full_forward(model, ids)
        load_checkpoint(model, folder)
        row["difference"] = (full_forward(model, ids) - reference).abs().max().item()
        assert (before - reference).abs().max() > 1, "the model had the weights before they were loaded"
        assert row["difference"] <= 1e-4, row
    with report.check(f"{layout} decodes over PiKV"):
        pieces = [20] + [1] * (LENGTH - 20)
        logits = decode(model, PiKVInferenceContext(2, LENGTH, model=model), ids, [20])
        at = torch.tensor(pieces).cumsum(0) - 1
        assert (logits - reference[:, at].transpose(0, 1)).abs().max() <= 1e-4
    if save:
        with report.check(f"{layout} the documented lines"):
            before = full_forward(model, ids)
            documented.run("save_checkpoint(model", model=model, folder=folder.with_name("documented"))
            assert (folder.with_name("documented") / "metadata.json").is_file() and torch.equal(full_forward(model, ids), before)
    with report.check(f"{layout} mismatches are refused") as row:
        weights = [parameter.clone() for parameter in model.parameters()]
        more_experts, with_bias = build(hf.config, num_moe_experts=16), build(hf.config, add_qkv_bias=True)
        refused(UnsupportedError, "global shape (8, 256, 192) in the checkpoint", lambda: load_checkpoint(more_experts, folder))
        refused(UnsupportedError, "linear_qkv.bias", lambda: load_checkpoint(with_bias, folder))
        refused(FileNotFoundError, "no dist checkpoint", lambda: load_checkpoint(model, folder.parent))
        assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))


def main() -> None:
    hf, _ = pikv_ds.bundled.load()
    folder, layouts = Path(sys.argv[1]), sys.argv[2:]
    each_layout(lambda report, layout: check_layout(report, layout, folder, hf, save=layout == layouts[0]), layouts)


if __name__ == "__main__":
    main()
