"""Checkpoints of an enabled model across layouts, and Megatron's static engine around it. Arguments: folder, layouts tp,ep,etp.

The first layout saves, every layout loads.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.transformer.enums import AttnBackend

import pikv_ds.bundled
from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, disable_pikv, enable_pikv
from pikv_ds.megatron_patch.checkpoint import load_checkpoint, save_checkpoint
from pikv_ds.megatron_patch.hf_config import build_gpt
from pikv_ds.megatron_patch.hf_weights import load_hf_weights
from pikv_ds.megatron_patch.layers import find_layers
from tests.dist.jobs.report import Report
from tests.megatron.models import start
from tests.megatron.runs import decode, full_forward

LENGTH = 60


def build(hf_config, **changes):
    options = {"attention_backend": AttnBackend.local, **cpu_compat.cpu_config_options(), **changes}
    return build_gpt(hf_config, max_sequence_length=512, **options).eval()


def check_layout(report: Report, layout: str, folder: Path, hf, save: bool) -> None:
    start(*map(int, layout.split(",")))
    ids = torch.randint(3, hf.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        reference = hf(ids).logits
    if save:
        source = build(hf.config)
        load_hf_weights(source, hf.config, hf.state_dict())
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
    with report.check(f"{layout} mismatches are refused") as row:
        weights = [parameter.clone() for parameter in model.parameters()]
        refused(
            lambda: load_checkpoint(build(hf.config, num_moe_experts=16), folder),
            UnsupportedError,
            "global shape (8, 256, 192) in the checkpoint",
        )
        refused(lambda: load_checkpoint(build(hf.config, add_qkv_bias=True), folder), UnsupportedError, "linear_qkv.bias")
        refused(lambda: load_checkpoint(model, folder.parent), FileNotFoundError, "no dist checkpoint")
        assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    dist.barrier()
    parallel_state.destroy_model_parallel()


def refused(call, kind: type, match: str) -> None:
    try:
        call()
    except kind as error:
        assert match in str(error), error
    else:
        raise AssertionError(f"not refused; expected {match!r}")


class Tokens:
    """What the controller asks of a tokenizer: ids are given and wanted as they are."""

    eod, bos, pad, vocab_size = 0, None, 1, 2048

    def tokenize(self, ids):
        return list(ids)

    def detokenize(self, ids, **options):
        return " ".join(str(int(token)) for token in ids)

    def offsets(self, *args):
        return []


def engine_tokens(model, context, prompts: list[list[int]]) -> tuple[list, list]:
    config = InferenceWrapperConfig(
        hidden_size=192, params_dtype=torch.float32, inference_batch_times_seqlen_threshold=-1, padded_vocab_size=2048,
        inference_max_requests=4, inference_max_seq_length=256,
    )  # fmt: skip
    controller = TextGenerationController(GPTInferenceWrapper(model, config, context), Tokens())
    engine = StaticInferenceEngine(controller, legacy=True, random_seed=1)
    sampling = SamplingParams(temperature=1.0, top_k=1, num_tokens_to_generate=6, return_log_probs=True)
    done = engine.generate(prompts=prompts, sampling_params=sampling)
    return [torch.as_tensor(request.generated_tokens).tolist() for request in done], [request.generated_log_probs for request in done]


def check_engine(report: Report, layout: str, folder: Path, hf, tokenizer) -> None:
    start(*map(int, layout.split(",")))
    with report.check(f"{layout} static engine") as row, cpu_compat.cuda_literals_on_cpu():
        prompts, keys = zip(*(pikv_ds.bundled.passkey_prompt(tokenizer, length, seed=length) for length in (100, 117)), strict=True)
        model = build(hf.config)
        load_checkpoint(model, folder)
        static, static_log_probs = engine_tokens(model, StaticInferenceContext(4, 256), prompts)
        enable_pikv(model)
        context = PiKVInferenceContext(4, 256, model=model)
        tokens, log_probs = engine_tokens(model, context, prompts)
        row["difference"] = (torch.tensor(log_probs) - torch.tensor(static_log_probs)).abs().max().item()
        assert tokens == static and row["difference"] <= 1e-4, (tokens, static, row)
        assert all(tokenizer.decode(own).strip().startswith(key) for own, key in zip(tokens, keys, strict=True)), (tokens, keys)
        assert context.stats()["entries_live"] > 0
        disable_pikv(model)
        assert find_layers(model)
    dist.barrier()
    parallel_state.destroy_model_parallel()


def main() -> None:
    report = Report()
    cpu_compat.install()
    hf, tokenizer = pikv_ds.bundled.load()
    folder, layouts = Path(sys.argv[1]), sys.argv[2:]
    for i, layout in enumerate(layouts):
        check_layout(report, layout, folder, hf, save=i == 0)
    check_engine(report, layouts[0], folder, hf, tokenizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
