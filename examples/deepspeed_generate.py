"""Generate under DeepSpeed. The script knows nothing of PiKV: the "pikv" block of the configuration does.

    deepspeed --num_accelerators 2 --module pikv_ds.launch.run examples/deepspeed_generate.py \
        --deepspeed_config examples/ds_config_autoep.json

With ds_config_replicated.json it also runs without `--module pikv_ds.launch.run` and prints the same text from the
ordinary dense cache: DeepSpeed ignores the block. (AutoEP on Qwen3-MoE needs PiKV's fix for transformers 5.23.)
To switch PiKV on in the script itself, write pikv_ds.initialize for deepspeed.initialize.
"""

import argparse

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pikv_ds.bundled import model_path

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--model", default=str(model_path()))
parser.add_argument("--prompt", default="The history of the town begins")
parser.add_argument("--max-new-tokens", type=int, default=32)
deepspeed.add_config_arguments(parser)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(args.model)
engine, *_ = deepspeed.initialize(args=args, model=model)
engine.eval()

batch = tokenizer(args.prompt, return_tensors="pt").to(engine.device)
with torch.no_grad():
    output = engine.module.generate(**batch, do_sample=False, max_new_tokens=args.max_new_tokens, synced_gpus=True)
if torch.distributed.get_rank() == 0:
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    if hasattr(engine, "pikv"):
        print({name: value for name, value in engine.pikv.stats().items() if name.startswith("kv_bytes")})
torch.distributed.destroy_process_group()
