"""lm-eval with a PiKV cache: registers the models `pikv_ds` (transformers) and `pikv_megatron` and calls lm-eval's own command line.

python -m pikv_ds.launch.evaluation.lm_eval --model pikv_ds --model_args pretrained=DIR,config=FILE --tasks NAME --include_path FOLDER
torchrun --nproc-per-node 2 -m pikv_ds.launch.evaluation.lm_eval --model pikv_megatron --model_args ep=2 --tasks NAME ...

model_args, all optional: pretrained (model folder; the bundled model), config (file with the "pikv" block; the defaults), dense (true: the
host's own cache), load (Megatron dist checkpoint), chunk (tokens per forward, 32), max_length, dtype (float32), tp, ep. All ranks run
the same requests.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.launch.cli import TOLD
from pikv_ds.launch.evaluation.job import start_distributed
from pikv_ds.launch.ranks import started_ranks

HOSTS = {"pikv_ds": "hf", "pikv_megatron": "megatron"}
OPTIONS = ("config", "load", "chunk", "dtype", "tp", "ep")


def open_scorer(
    host: str, *, pretrained: str | None = None, dense: bool = False, max_length: int | None = None, batch_size: Any = 1, **options: Any
):
    """A Scorer over the model that the model_args name, on the ranks of the launcher, or on one. The other options are `pikv eval`'s."""
    from pikv_ds.adapters.hf.model_spec import load_model_config
    from pikv_ds.bundled import model_path
    from pikv_ds.launch.cli import build_parser
    from pikv_ds.launch.evaluation.job import backend_class
    from pikv_ds.launch.evaluation.plan import read_spec
    from pikv_ds.launch.evaluation.scoring import Scorer

    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise ConfigError(f"model_args has the unknown key {unknown[0]!r}; legal: pretrained, dense, max_length, {', '.join(OPTIONS)}")
    if not str(batch_size).isdigit():
        raise ConfigError(f"batch_size = {batch_size!r}: legal is a number of sequences; automatic sizes are not supported")
    text_config = load_model_config(pretrained or model_path()).get_text_config(decoder=True)
    ranks = started_ranks() or 1
    given = {
        "backend": host,
        "model": pretrained,
        "context": max_length or text_config.max_position_embeddings,
        "batch": batch_size,
        "ranks": ranks,
    }
    words = [word for name, value in (given | options).items() if value is not None for word in (f"--{name}", str(value))]
    spec, units = read_spec(build_parser().parse_args(["eval", "--tasks", "ppl", *words]))
    if ranks > 1 or host == "megatron":
        start_distributed()
    backend = backend_class(host)(spec, 300)
    return Scorer(backend, None if dense else units[-1].block, chunk=spec.chunk, batch=spec.batch, max_length=spec.context)


def register() -> None:
    """Make the models known to lm-eval. Raises ConfigError when it is not installed."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError(f"lm-eval can't be imported ({error}); pip install 'lm-eval>=0.4.9,<0.5'") from None
    for name, host in HOSTS.items():
        register_model(name)(_model_class(TemplateLM, host))


def _model_class(base: type, host: str) -> type:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

    class PiKVModel(base):
        """Every rank is rank 0 of 1 to lm-eval, as under tensor parallelism: all run the same requests, the first one reports."""

        def __init__(self, batch_size: Any = None, max_batch_size: Any = None, device: Any = None, **model_args: Any) -> None:
            super().__init__()
            self.scorer = open_scorer(host, batch_size=batch_size or 1, **model_args)
            self.tokenizer = self.scorer.backend.tokenizer

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

        @property
        def tokenizer_name(self) -> str:
            return Path(self.tokenizer.name_or_path).name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return self.tokenizer(string, verbose=False, **options)["input_ids"]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)

        def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
            with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as bar:
                return self.scorer.loglikelihoods([(context, continuation) for _, context, continuation in requests], bar.update)

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            pairs, owners = [], []
            for owner, request in enumerate(requests):
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = get_rolling_token_windows(ids, self.prefix_token_id, self.scorer.max_length, 1)
                found = [make_disjoint_window(window) for window in windows]
                pairs, owners = pairs + found, owners + [owner] * len(found)
            with tqdm(total=len(pairs), disable=disable_tqdm, desc="rolling log-likelihoods") as bar:
                scores = self.scorer.loglikelihoods(pairs, bar.update)
            totals = [0.0] * len(requests)
            for owner, (score, _) in zip(owners, scores, strict=True):
                totals[owner] += score
            return totals

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            prompts = [(self.tok_encode(request.args[0]), *_greedy_options(request.args[1], self.tokenizer)) for request in requests]
            with tqdm(total=len(prompts), disable=disable_tqdm, desc="generations") as bar:
                return self.scorer.generate(prompts, bar.update)

    return PiKVModel


def _greedy_options(options: dict[str, Any], tokenizer: Any) -> tuple[int, tuple[str, ...]]:
    """Most new tokens and stop strings of lm-eval's generation options; sampling is refused."""
    if options.get("do_sample") and options.get("temperature", 1.0) != 0.0:
        raise UnsupportedError(f"generation options {options}: only greedy decoding is supported; set do_sample: false in the task")
    until = options.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    end = () if tokenizer.eos_token is None else (tokenizer.eos_token,)
    return int(options.get("max_gen_toks", 256)), stops + end


def main() -> int:
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except TOLD as error:
        print(f"lm_eval: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        print(f"lm_eval: {error}; --include_path FOLDER adds task files of your own", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
