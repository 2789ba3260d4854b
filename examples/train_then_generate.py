"""Rollouts inside training: a training step, text from the model as it is, another training step.

    deepspeed --num_accelerators 2 examples/train_then_generate.py

The cache is used by `generate` only; the losses are those of training without it.
"""

import argparse
import json
from pathlib import Path

import torch

import pikv_ds
from pikv_ds.bundled import haystack, load

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--config", default=str(Path(__file__).parent / "ds_config_autoep.json"))
args = parser.parse_args()

config = json.loads(Path(args.config).read_text())
config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}

model, tokenizer = load()
engine, *_ = pikv_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
rank = torch.distributed.get_rank()
text = tokenizer(haystack(), return_tensors="pt", verbose=False)["input_ids"][0].to(engine.device)

for step in range(args.steps):
    engine.train()
    start = 64 * (rank + torch.distributed.get_world_size() * step)
    ids = text[None, start : start + 64]
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    engine.eval()
    with torch.no_grad():
        rollout = engine.module.generate(ids[:, :16], do_sample=False, max_new_tokens=16, synced_gpus=True)
    if rank == 0:
        print(f"step {step}: loss {loss.item():.6f}, rollout {tokenizer.decode(rollout[0, 16:])!r}")
if rank == 0:
    print({name: value for name, value in engine.pikv.stats().items() if name.startswith("kv_bytes")})
torch.distributed.destroy_process_group()
