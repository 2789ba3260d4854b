"""A user's script: the bundled model under a "pikv" block from a JSON file. It imports no method and knows none.

args: the file.
"""

import os
import sys

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds import bundled
from tests.dist.jobs.report import Report

NEW_TOKENS = 12


def main() -> None:
    report = Report()
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    group = dist.group.WORLD if dist.is_initialized() else None
    model, tokenizer = bundled.load(torch.float32)
    ids, _ = bundled.passkey_prompt(tokenizer, 400)
    with report.check("generates") as row, torch.no_grad(), pikv_ds.attach(model, sys.argv[1], group) as cache:
        text = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        row |= {"tokens": text[0, len(ids) :].tolist()} | cache.stats()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
