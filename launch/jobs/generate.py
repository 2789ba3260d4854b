"""The work of `pikv generate`: in its own process for one rank, started by the launcher for several."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pikv_ds.launch.ranks import gather, own_stdout

LONG_PREFILL = 512


def generate_all(spec: dict[str, Any], stdout: TextIO | None) -> list[dict[str, Any]]:
    """Generate from every prompt of the spec. Text goes to `stdout`, or nowhere on ranks that get None."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pikv_ds.launch.device import own_device

    dtype = getattr(torch, spec["dtype"]) if spec["dtype"] else "auto"
    device = own_device()
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, local_files_only=True).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True)
    with open_cache(model, spec["ds_config"]) as (model, cache):
        if spec["session"] is not None:
            return _turns(model, cache, tokenizer, spec, stdout)
        return [_generate(model, cache, tokenizer, prompt, spec, stdout) for prompt in spec["prompts"]]


def _turns(model: Any, cache: Any, tokenizer: Any, spec: dict[str, Any], stdout: TextIO | None) -> list[dict[str, Any]]:
    """Prompts are turns of one session, that of a file if it is there, which is saved at the end."""
    from pikv_ds.launch.ranks import gather

    path = Path(spec["session"])
    with cache.session(path.name) as session:
        if any(gather(path.exists())):
            session.load(path)
        rows = [_generate(model, session, tokenizer, prompt, spec, stdout) for prompt in spec["prompts"]]
        rows[-1]["session_bytes"] = session.save(path)
    return rows


@contextlib.contextmanager
def open_cache(model: Any, ds_config: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The model to call and its cache: attached directly in one process, by pikv_ds.initialize under a launcher."""
    import pikv_ds
    from pikv_ds.launch.ranks import started_ranks

    if started_ranks() is None:
        with pikv_ds.attach(model, ds_config) as cache:
            yield model, cache
        return
    engine = pikv_ds.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1, **ds_config})[0]
    engine.eval()
    yield engine.module, engine.pikv
    engine.pikv.detach()


def _generate(model: Any, cache: Any, tokenizer: Any, prompt: str, spec: dict[str, Any], stdout: TextIO | None) -> dict:
    import torch

    session = cache if spec["session"] is not None else None
    begins = session is None or not session.columns
    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=begins).to(model.device)
    prompt_tokens = batch["input_ids"].shape[1]
    streamer = _streamer(tokenizer, stdout)
    started = time.perf_counter()
    if stdout is not None:
        stdout.write(prompt)
    with torch.no_grad(), _prefill_bar(cache, prompt_tokens, spec["chunk"], stdout):
        options = {
            "do_sample": False, "max_new_tokens": spec["max_new_tokens"], "streamer": streamer, "prefill_chunk_size": spec["chunk"],
            "use_cache": True,
        }  # fmt: skip
        if session is None:
            held, output = 0, model.generate(**batch, **options)
        else:
            held, output = session.said_columns, session.generate(batch["input_ids"], **options)
    elapsed_s = time.perf_counter() - started
    new = output[0, held + prompt_tokens :]
    stats = cache.stats()
    row = {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new),
        "tokens_per_s": len(new) / elapsed_s,
        "stats": stats,
        "kv_bytes_per_rank": gather(stats["kv_bytes_allocated"]),
        "kv_bytes_dense": stats["kv_bytes_dense"],
    }
    if session is None:
        cache.reset()
    return row


def _streamer(tokenizer: Any, stdout: TextIO | None) -> Any:
    from transformers import TextStreamer

    class ToStream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if stdout is not None:
                print(text, end="\n" if stream_end else "", file=stdout, flush=True)

    return ToStream(tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextlib.contextmanager
def _prefill_bar(cache: Any, prompt_tokens: int, chunk: int | None, stdout: TextIO | None) -> Iterator[None]:
    """A progress bar over the chunks of a long prompt; it goes away when the first token comes."""
    if stdout is None or chunk is None or prompt_tokens < max(LONG_PREFILL, 2 * chunk):
        yield
        return
    from rich.console import Console
    from rich.progress import Progress

    stdout.write("\n")
    # Redirection would bring what libraries write to stderr back to the terminal.
    console = Console(file=stdout)
    with Progress(console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("prefill", total=prompt_tokens)

        def advance(step: int) -> None:
            progress.update(task, completed=min(cache.get_seq_length(), prompt_tokens))
            if progress.finished:
                progress.stop()

        cache.end_of_step_callbacks.append(advance)
        try:
            yield
        finally:
            cache.end_of_step_callbacks.remove(advance)


def main() -> None:
    stdout = own_stdout()
    import deepspeed
    import torch.distributed as dist

    spec_file, result = map(Path, sys.argv[1:3])
    deepspeed.init_distributed()
    first = dist.get_rank() == 0
    rows = generate_all(json.loads(spec_file.read_text(encoding="utf-8")), stdout if first else None)
    if first:
        result.write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
