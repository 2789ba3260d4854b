"""More context than memory: `python -m pikv_ds.launch.bench.more_context --json FILE`. Needs the real model (launch/real_model.py).

Each run is a process of its own. It loads the model, runs a prompt of 64 tokens, and then may take only so much more memory (RLIMIT_DATA):

    limit = what it uses then + the workspace of a chunk + a quarter of the bytes of a dense cache of the context

The workspace is measured in the run without a limit: the most memory while the first chunk runs, less that chunk's dense bytes. Runs:
    unlimited   PiKV without tiers and without a limit: the tokens that the others must give
    tiers       PiKV under the limit: an eighth of the dense bytes near, a sixteenth for staging, the rest in files
    dynamic     transformers' DynamicCache under the limit
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WARM = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000, help="of the prompt (default 8000)")
    parser.add_argument("--new", type=int, default=64, help="tokens generated (default 64)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a forward of the prompt (default 256)")
    parser.add_argument("--files", default=None, metavar="DIR", help="folder for page files (default: a temporary one)")
    parser.add_argument("--json", default=None, metavar="FILE")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--extra", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(child(args)))
        return 0
    rows = measure(args)
    if args.json is not None:
        from pikv_ds.launch.output import write_json

        write_json(args.json, f"-m pikv_ds.launch.bench.more_context --tokens {args.tokens} --new {args.new} --chunk {args.chunk}", rows)
    dynamic, tiers = rows[2], rows[1]
    return 0 if tiers.get("equal") and dynamic["ended"] != "finished" else 1


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        files = args.files or folder
        free = _run(args, "unlimited", None, files)
        if "tokens" not in free:
            raise RuntimeError(f"the run without a limit failed: {free}")
        extra = free["workspace_bytes"] + free["dense_bytes"] // 4
        tiers, dynamic = (_run(args, kind, extra, files) for kind in ("tiers", "dynamic"))
    tiers["equal"] = tiers.get("tokens") == free["tokens"]
    return [free, tiers, dynamic]


def _run(args: argparse.Namespace, kind: str, extra: int | None, files: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pikv_ds.launch.bench.more_context", "--child", kind, "--files", files]
    command += ["--tokens", str(args.tokens), "--new", str(args.new), "--chunk", str(args.chunk)] + (
        [] if extra is None else ["--extra", str(extra)]
    )
    done = subprocess.run(command, capture_output=True, text=True)
    row = {"run": kind, "limit_extra_bytes": extra}
    if done.returncode == 0:
        row |= json.loads(done.stdout.splitlines()[-1]) | {"ended": "finished"}
    else:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        row |= {"ended": f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}", "error": last[:300]}
    print(json.dumps({key: value for key, value in row.items() if key != "tokens"}), flush=True)
    return row


def child(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from pikv_ds.adapters.hf import attach
    from pikv_ds.launch.real_model import needed

    torch.set_num_threads(1)
    path = needed("dense")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    text = (Path(__file__).parents[2] / "pikv_ds" / "bundled" / "wikitext2_test.txt").read_text()
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, : args.tokens]
    config = model.config
    dense = args.tokens * config.num_hidden_layers * config.num_key_value_heads * 2 * (config.hidden_size // config.num_attention_heads) * 2
    block: dict[str, Any] = {"probe": "never"}
    if args.child == "tiers":
        block["offload"] = {
            "device_gib": dense / 8 / 2**30, "staging_mib": dense / 16 / 2**20, "nvme_path": args.files, "nvme_gib": 2 * dense / 2**30,
        }  # fmt: skip
    cache = DynamicCache() if args.child == "dynamic" else attach(model, block)
    with torch.no_grad():
        for part in (ids[:, :WARM], ids[:, :1]):
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if args.child == "dynamic":
            cache = DynamicCache()
        else:
            cache.reset()
        before = _data_bytes()
        if args.extra is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (before + args.extra, before + args.extra))
        cpu, peak, found = time.process_time(), _Peak(watch=args.extra is None), []
        for i, part in enumerate(ids.split(args.chunk, 1)):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            if i == 0:
                workspace = peak.stop() - before - dense * args.chunk // args.tokens
        prefill = time.process_time() - cpu
        for _ in range(args.new):
            found.append(int(logits[0, -1].argmax()))
            logits = model(input_ids=torch.tensor([[found[-1]]]), past_key_values=cache, use_cache=True).logits
    row = {"context": args.tokens, "dense_bytes": dense, "used_bytes": before, "most_bytes": _data_bytes(), "tokens": found}
    row |= {"prefill_cpu_s": prefill, "decode_cpu_s": time.process_time() - cpu - prefill, "workspace_bytes": max(workspace, 0)}
    return (
        row if args.child == "dynamic" else row | {"stats": {k: v for k, v in cache.stats().items() if k.startswith(("kv_", "offload_"))}}
    )


def _data_bytes() -> int:
    """VmData of this process: what RLIMIT_DATA bounds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmData")


class _Peak:
    """The most memory until `stop`, looked at every 2 ms."""

    def __init__(self, *, watch: bool) -> None:
        self._most, self._ends = _data_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True) if watch else None
        if self._thread is not None:
            self._thread.start()

    def _look(self) -> None:
        while not self._ends.wait(0.002):
            self._most = max(self._most, _data_bytes())

    def stop(self) -> int:
        self._ends.set()
        if self._thread is not None:
            self._thread.join()
        return self._most


if __name__ == "__main__":
    sys.exit(main())
