"""Rollouts inside training, GRPO style: text from the model as it is, a reward that can be checked, a training step, and again.

    deepspeed --num_accelerators 2 examples/grpo_tiny.py [--stage 3] [--cache ordinary] [--json FILE]

The bundled model knows pass keys when it is asked as in its training. Here it is asked in other words, which it answers one time in
six at first. Every rank draws a group of answers to each of its prompts through PiKV; the reward of an answer is the share of the key's
digits that it begins with, the advantage is what it is better than its group. `--cache ordinary` draws the same answers without PiKV.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.bundled import calibration_text, load
from pikv_ds.bundled.recall import Prose, recall_prompt

ASKED = " What was it? It is"

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--rounds", type=int, default=24)
parser.add_argument("--prompts", type=int, default=2, help="of a rank and round")
parser.add_argument("--group", type=int, default=8, help="answers to each")
parser.add_argument("--context", type=int, default=256)
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--stage", type=int, default=1, help="ZeRO's")
parser.add_argument("--cache", choices=("pikv", "ordinary"), default="pikv")
parser.add_argument("--config", default=str(Path(__file__).parent / "ds_config_replicated.json"))
parser.add_argument("--json", help="write the rounds there")
args = parser.parse_args()


def prompts_of(round_: int, rank: int) -> tuple[torch.Tensor, list[str]]:
    """[P, T] and the keys. The recall task, asked otherwise; cut at the front to one length."""
    draw, rows, keys = random.Random(f"{args.seed} {round_} {rank}"), [], []
    for _ in range(args.prompts):
        prompt = recall_prompt(prose, args.context, kind="passkey", depth=draw.uniform(0.1, 0.9), seed=draw.getrandbits(40))
        rows.append(prompt.ids[: -prompt.question_tokens] + question)
        keys.append(prompt.answer)
    length = min(map(len, rows))
    return torch.tensor([row[:1] + row[1 - length :] for row in rows]), keys


def reward_of(text: str, key: str) -> float:
    """Share of the key's digits that the answer begins with."""
    right = next((i for i, (a, b) in enumerate(zip(text.strip(), key, strict=False)) if a != b), min(len(text.strip()), len(key)))
    return right / len(key)


def rollout(ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[P G, T + n], a group after the other; and the KV bytes of this rank."""
    engine.eval()
    with torch.no_grad():
        drawn = engine.module.generate(
            ids,
            do_sample=True,
            num_return_sequences=args.group,
            max_new_tokens=answer,
            min_new_tokens=answer,
            synced_gpus=True,
            return_dict_in_generate=True,
        )
    if args.cache == "pikv":
        return drawn.sequences, engine.pikv.stats()["kv_bytes_allocated"]
    return drawn.sequences, sum(x.nbytes for layer in drawn.past_key_values.layers for x in (layer.keys, layer.values))


def learn(sequences: torch.Tensor, advantages: torch.Tensor) -> float:
    """One step on the answers that were just drawn, so their probabilities are those of the weights."""
    engine.train()
    logits = engine(input_ids=sequences, use_cache=False, logits_to_keep=answer + 1).logits[:, :-1]
    log_probs = logits.float().log_softmax(-1).gather(-1, sequences[:, -answer:, None]).squeeze(-1)
    loss = -(advantages[:, None] * log_probs).mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def mean(*values: float) -> list[float]:
    """Of all ranks."""
    found = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(found)
    return (found / dist.get_world_size()).tolist()


config = json.loads(Path(args.config).read_text())
config["optimizer"] = {"type": "AdamW", "params": {"lr": args.lr, "torch_adam": True}}
config |= {"zero_optimization": {"stage": args.stage}, "gradient_clipping": 1.0}
if args.cache == "ordinary":
    del config["pikv"]
model, tokenizer = load(torch.float32)
prose = Prose(tokenizer, calibration_text())
question, answer = prose.encode(ASKED), prose.answer_tokens()
engine, *_ = pikv_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
rank, rounds = dist.get_rank(), []
for i in range(args.rounds):
    ids, keys = prompts_of(i, rank)
    torch.manual_seed(1000 * args.seed + 100 * i + rank)
    began, cpu = time.perf_counter(), time.process_time()
    sequences, kv_bytes = rollout(ids.to(engine.device))
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    texts = tokenizer.batch_decode(sequences[:, ids.shape[1] :])
    rewards = torch.tensor([reward_of(text, keys[j // args.group]) for j, text in enumerate(texts)]).view(-1, args.group)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    loss = learn(sequences, advantages.flatten().to(engine.device))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").is_file() else 0
    reward, right = mean(rewards.mean().item(), (rewards == 1).double().mean().item())
    rounds.append({
        "round": i, "reward": reward, "right": right, "loss": loss, "kv_bytes_per_rank": kv_bytes, "rollout_s": took,
        "rollout_cpu_s": cpu, "resident_bytes": resident,
    })  # fmt: skip
    if rank == 0:
        print(f"round {i}: reward {reward:.3f}, right {right:.3f}, KV {kv_bytes:,} bytes a rank, rollout {cpu:.2f} s of CPU", flush=True)
if rank == 0 and args.json:
    said = {**vars(args), "config": Path(args.config).name}
    del said["json"], said["local_rank"]
    Path(args.json).write_text(json.dumps({"arguments": said, "ranks": dist.get_world_size(), "rounds": rounds}, indent=1) + "\n")
dist.destroy_process_group()
