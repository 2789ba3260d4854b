"""A Megatron-LM user's static-inference script in small, without PiKV: the shape of Megatron-LM's tools/run_text_generation_server.py and
examples/inference/gpt/gpt_static_inference.py. test_engine.py applies the diff of docs/guide/megatron.md to this text and runs both.
"""

import argparse

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import import_module

from tests.megatron import hosts
from tests.megatron.models import VOCAB, tiny_config, tiny_model


class Tokenizer:
    """One token per byte; no token ends a text, so all ranks run the same number of forwards."""

    vocab_size, eod, bos, pad = VOCAB, VOCAB, None, 0

    def tokenize(self, text: str) -> list[int]:
        return [byte % VOCAB for byte in text.encode()]

    def detokenize(self, ids, **kwargs) -> str:
        return " ".join(str(int(i)) for i in ids)

    def offsets(self, ids, text) -> list[int]:
        return list(range(len(ids)))


def get_model(args):
    config = tiny_config(attention_backend=AttnBackend.local)
    spec = import_module(args.spec) if args.spec is not None else None
    return tiny_model(config, spec)


def get_inference_engine(args, model) -> StaticInferenceEngine:
    tokenizer = Tokenizer()
    wrapper_config = hosts.wrapper_config(
        model, inference_max_requests=args.inference_max_requests, inference_max_seq_length=args.inference_max_seq_length
    )
    # fmt: off
    inference_context = StaticInferenceContext(
        args.inference_max_requests, args.inference_max_seq_length
    )
    # fmt: on
    inference_wrapped_model = hosts.inference_wrapper(model, inference_context, wrapper_config)
    controller = TextGenerationController(inference_wrapped_model, tokenizer)
    return StaticInferenceEngine(controller, legacy=args.use_legacy_static_engine)


def main(argv: list[str]):
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", nargs=2, default=None)
    parser.add_argument("--use-legacy-static-engine", action="store_true")
    parser.add_argument("--inference-max-requests", type=int, default=4)
    parser.add_argument("--inference-max-seq-length", type=int, default=64)
    parser.add_argument("--num-tokens-to-generate", type=int, default=12)
    parser.add_argument("--prompts", nargs="+")
    args = parser.parse_args(argv)
    engine = get_inference_engine(args, get_model(args))
    sampling = SamplingParams(temperature=1.0, top_k=1, num_tokens_to_generate=args.num_tokens_to_generate, return_log_probs=True)
    with torch.inference_mode():
        return engine, engine.generate(prompts=args.prompts, sampling_params=sampling)
