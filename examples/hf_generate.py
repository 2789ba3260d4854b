"""Generate with a Hugging Face model whose KV cache is PiKV's: on one process, or kept once on the processes of a group.

    python examples/hf_generate.py [CONFIG.json]
    torchrun --nproc-per-node 2 examples/hf_generate.py [CONFIG.json]

CONFIG.json holds a "pikv" block; without it the defaults hold, and the text is that of the ordinary cache.
"""

import os
import sys

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds import bundled

if "RANK" in os.environ:
    dist.init_process_group("gloo")
model, tokenizer = bundled.load(torch.float32)  # or AutoModelForCausalLM.from_pretrained(...)
ids, answer = bundled.passkey_prompt(tokenizer, 600)
config = sys.argv[1] if len(sys.argv) > 1 else {}
with pikv_ds.attach(model, config, dist.group.WORLD if dist.is_initialized() else None) as cache:
    text = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    print(f"{tokenizer.decode(text[0, len(ids) :])!r} expected {answer} entries {cache.stats()['load_per_rank']}")
if dist.is_initialized():
    dist.destroy_process_group()
