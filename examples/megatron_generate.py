"""Generate with a Megatron-Core model whose KV cache is PiKV's, on CPU and gloo; experts and entries lie over the processes.

    torchrun --nproc-per-node 2 examples/megatron_generate.py

The four lines that switch PiKV on in a script of your own: docs/guide/megatron.md.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from pikv_ds import bundled
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, enable_pikv
from pikv_ds.megatron_patch.hf_config import build_gpt
from pikv_ds.megatron_patch.hf_weights import load_hf_weights

LONGEST = 640

dist.init_process_group("gloo")
cpu_compat.install()
parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
model_parallel_cuda_manual_seed(0)

hf, tokenizer = bundled.load(torch.float32)
model = build_gpt(hf.config, max_sequence_length=LONGEST, **cpu_compat.cpu_config_options()).eval()
load_hf_weights(model, hf.config, hf.state_dict())
enable_pikv(model, {"storage": {"requests": "replicated"}})
context = PiKVInferenceContext(1, LONGEST, model=model)  # in place of StaticInferenceContext

prompt, answer = bundled.passkey_prompt(tokenizer, 600)
ids, text = torch.tensor([prompt]), []
with torch.no_grad():
    while len(text) < 8:
        start, end = context.sequence_len_offset, context.sequence_len_offset + ids.shape[1]
        mask = torch.ones(ids.shape[1], end, dtype=torch.bool).triu(1 + start)[None, None]  # True hides
        logits = model(ids, torch.arange(start, end)[None], mask, inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(end - start)
        ids = logits[:, -1:].argmax(-1)
        text.append(ids.item())
print(f"{tokenizer.decode(text)!r} expected {answer} entries {context.stats()['load_per_rank']}")
dist.destroy_process_group()
