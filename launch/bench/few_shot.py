"""`pikv bench fewshot`: a 5-shot lm-eval task, with storage.prefix and without: scores, tokens that forwards run, CPU time.

The task is made here, as no data set comes along: sentences that hide a key in the bundled text, a choice between two continuations, and
generation of the key. All documents have the same shots (sampler first_n), as those of MMLU have.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from pikv_ds.launch.output import print_table, write_json

TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_target: 1\ndoc_to_choice: '{{choices}}'\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "passkey": "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: ' {{answer}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 8}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}
BLOCKS = {"off": {}, "on": {"storage": {"prefix": {"enabled": True}}}}
SHOWN = ("prefix", "task", "score", "tokens_run", "cpu_s", "wall_s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--documents", type=int, default=16, metavar="N", help="of each task (default 16)")
    parser.add_argument("--shots", type=int, default=5, metavar="N", help="examples before each (default 5)")
    parser.add_argument("--tokens", type=int, default=60, metavar="N", help="of a document (default 60)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="requests of a forward (default 1)")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="pikv_fewshot_") as folder:
        os.environ.setdefault("HF_HOME", str(Path(folder) / "hf"))
        write_tasks(Path(folder), args.documents, args.tokens, args.shots)
        rows = [row for name in BLOCKS for row in measure(name, Path(folder), args.shots, args.batch)]
    print_table(
        f"{args.shots}-shot, {args.documents} documents of {args.tokens} tokens, batch {args.batch}",
        [{key: float(f"{row[key]:.4g}") if isinstance(row[key], float) else row[key] for key in SHOWN} for row in rows],
    )
    write_json(args.json, "bench fewshot", rows)
    by_task = {task: {row["answers"] for row in rows if row["task"] == task} for task in TASKS}
    return 1 if any(len(answers) > 1 for answers in by_task.values()) else 0


def write_tasks(folder: Path, documents: int, tokens: int, shots: int) -> None:
    from pikv_ds.bundled import load, passkey_prompt

    tokenizer = load()[1]
    for split, first, count in (("test", 0, documents), ("shots", 1000, shots)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for seed in range(first, first + count):
                ids, key = passkey_prompt(tokenizer, tokens, seed=seed)
                choices = [f" {key[1:] + key[:1]}", f" {key}"]
                file.write(json.dumps({"prompt": tokenizer.decode(ids), "answer": key, "choices": choices}) + "\n")
    files = f"{{test: '{folder / 'test.jsonl'}', shots: '{folder / 'shots.jsonl'}'}}"
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\nfewshot_split: shots\n"
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: pikv_{name}\n{data}fewshot_config: {{sampler: first_n}}\n{body}", encoding="utf-8")


def measure(name: str, folder: Path, shots: int, batch: int) -> list[dict[str, Any]]:
    """A row per task. answers: all of lm-eval's responses, log-likelihoods to three digits, as a text that can be compared."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from pikv_ds.launch.evaluation.harness import cache_lm

    config = folder / f"{name}.json"
    config.write_text(json.dumps({"pikv": {"page_size": 16, **BLOCKS[name]}}), encoding="utf-8")
    torch.manual_seed(0)
    lm = cache_lm(HFLM, "hf")(config=str(config), dtype="float32", batch_size=batch, device="cpu")
    tasks, found, seen = TaskManager(include_path=str(folder)), [], []
    lm.model.register_forward_pre_hook(
        lambda module, args, given: seen.append((args[0] if args else given["input_ids"]).numel()), with_kwargs=True
    )
    for task in TASKS:
        seen.clear()
        started, cpu = time.perf_counter(), time.process_time()
        made = lm_eval.simple_evaluate(
            lm, tasks=[f"pikv_{task}"], num_fewshot=shots, task_manager=tasks, bootstrap_iters=0, log_samples=True
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - started
        (score,) = (value for key, value in made["results"][f"pikv_{task}"].items() if key in ("acc,none", "exact_match,none"))
        answers = [_short(sample["resps"]) for sample in made["samples"][f"pikv_{task}"]]
        found.append(
            {"prefix": name, "task": task, "score": score, "tokens_run": sum(seen), "cpu_s": cpu, "wall_s": wall, "shots": shots,
             "batch": batch, "answers": json.dumps(answers)}
        )  # fmt: skip
    return found


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value
