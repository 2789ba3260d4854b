"""Instructions that a warp executes for a token of a kv head, counted in the machine code.

    python -m tests.ops.sass --json docs/results/sass.json          needs nvcc, and nvdisasm or cuobjdump (NVDISASM names one)

A kernel's loop over the tokens is the smallest that has its products; its instructions are those of the way through it that does all
the work of a whole tile (the most products and loads) in the fewest instructions, so without window and lse of pages. What lies around
it, once per group or page, is shared among 64 tokens. Nothing is run: how long an instruction takes is not known here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.ops.build.compile import CSRC
from pikv_ds.ops.build.cuda_build import nvcc
from pikv_ds.ops.format.formats import FORMATS
from pikv_ds.ops.format.kernels import KERNEL_FORMATS, TENSOR

DIM, UNIT = 128, 64
BUDGET = {"bf16": 14, "fp16": 14, "int8": 30, "fp8_e4m3": 30, "int4": 32}  # instructions for a token and head, DIM columns, 8 query rows
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\d+)\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_x?_?\d+):|^(\.L_x_\d+):")


@dataclass(frozen=True)
class Instruction:
    predicate: str
    name: str
    arguments: str

    @property
    def target(self) -> str | None:
        """Where a branch goes that may be taken: not that of a divergent warp."""
        found = re.search(r"`\((\.L_x_\d+)\)", self.arguments)
        return found[1] if found and self.name.startswith("BRA") and not self.name.startswith("BRA.DIV") else None

    @property
    def ends(self) -> bool:
        return not self.predicate and (self.name in ("EXIT", "RET") or (self.target is not None and "P" not in self.arguments.split("`")[0]))


Block = list[Instruction]


def disassembler() -> str | None:
    """nvdisasm: NVDISASM, beside nvcc, in the path, or in the packages triton and nvidia-cuda-nvdisasm; None = there is none."""
    given = os.environ.get("NVDISASM") or shutil.which("nvdisasm")
    folders = [Path(shutil.which(nvcc()) or "/").resolve().parent, *Path("/usr/local").glob("cuda*/bin")]
    folders += [path for root in sys.path for path in Path(root).glob("triton/backends/nvidia/bin")]
    return given or next((str(folder / "nvdisasm") for folder in folders if (folder / "nvdisasm").is_file()), None)


@cache
def listings(source: str, code: int, arch: str = "90", csrc: Path = CSRC) -> dict[str, str]:
    """Mangled name of each kernel -> its listing."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = ("-O3", "-std=c++17", "-cubin", f"-DPK_FORMAT={code}", f"-gencode=arch=compute_{arch},code=sm_{arch}")
        subprocess.run([nvcc(), *flags, str(csrc / source), "-o", str(cubin)], check=True, capture_output=True, timeout=600)
        text = subprocess.run([disassembler(), "-c", str(cubin)], check=True, capture_output=True, text=True, timeout=600).stdout
    parts = re.split(r"\.section\s+\.text\.(\w+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks_of(listing: str) -> tuple[list[Block], list[list[int]]]:
    """Basic blocks, and where each may go."""
    blocks: list[Block] = [[]]
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1] or label[2]] = len(blocks) - 1
        elif found := _INSTRUCTION.match(line):
            blocks[-1].append(Instruction(found[2] or "", found[3], found[4]))
            if blocks[-1][-1].target or blocks[-1][-1].ends:
                blocks.append([])
    follow = []
    for i, block in enumerate(blocks):
        ways = [labels[block[-1].target]] if block and block[-1].target else []
        if (not block or not block[-1].ends) and i + 1 < len(blocks):
            ways.append(i + 1)
        follow.append(ways)
    return blocks, follow


def loops(follow: list[list[int]]) -> list[tuple[int, set[int]]]:
    """Heads and bodies, smallest first."""
    state, back = [0] * len(follow), []
    stack = [(0, iter(follow[0]))]
    state[0] = 1
    while stack:
        at, ways = stack[-1]
        for to in ways:
            if state[to] == 1:
                back.append((at, to))
            elif state[to] == 0:
                state[to] = 1
                stack.append((to, iter(follow[to])))
                break
        else:
            state[at] = 2
            stack.pop()
    came = [[] for _ in follow]
    for at, ways in enumerate(follow):
        for to in ways:
            came[to].append(at)
    bodies: dict[int, set[int]] = {}
    for latch, head in back:
        body, todo = bodies.setdefault(head, {head}), [latch]
        while todo:
            at = todo.pop()
            if at not in body:
                body.add(at)
                todo += came[at]
    return sorted(bodies.items(), key=lambda item: len(item[1]))


def worth(block: Block, product: str) -> int:
    return sum(i.name.startswith(product) or ".NA" in i.name or (product == "FFMA" and i.name.startswith("LDG")) for i in block)


def way_through(blocks: list[Block], follow: list[list[int]], head: int, body: set[int], product: str) -> list[Instruction]:
    """The instructions of one round: the most work, then the fewest instructions. Inner loops are taken once."""
    best: dict[int, tuple[tuple[int, int], list[int]]] = {}
    on_way: set[int] = set()

    def search(at: int) -> tuple[tuple[int, int], list[int]] | None:
        if at in best:
            return best[at]
        on_way.add(at)
        found = None
        for to in follow[at]:
            rest = ((0, 0), []) if to == head else search(to) if to in body and to not in on_way else None
            if rest is not None and (found is None or rest[0] > found[0]):
                found = rest
        on_way.discard(at)
        if found is not None:
            found = ((found[0][0] + worth(blocks[at], product), found[0][1] - len(blocks[at])), [at, *found[1]])
            best[at] = found
        return found

    sys.setrecursionlimit(20000)
    found = search(head)
    return [i for at in found[1] for i in blocks[at]] if found else []


def count(listing: str, product: str, row_bytes: int) -> dict[str, float]:
    """Instructions of the loop and of what lies around it, the tokens of a round."""
    blocks, follow = blocks_of(listing)
    nest = [(head, body) for head, body in loops(follow) if any(worth(blocks[i], product) and any(x.name.startswith(product) for x in blocks[i]) for i in body)]
    most = max(sum(i.name.startswith(product) for at in body for i in blocks[at]) for _, body in nest)
    nest = [(head, body) for head, body in nest if 2 * sum(i.name.startswith(product) for at in body for i in blocks[at]) > most or product == "HMMA"]
    inner = way_through(blocks, follow, *nest[0], product)
    loaded = sum(32 * int(re.search(r"\.(128|64)", i.name + ".32")[1]) // 8 if re.search(r"\.(128|64)", i.name) else 128 for i in inner if ".NA" in i.name)
    around = way_through(blocks, follow, *nest[-2 if len(nest) > 1 else 0], product)
    return {"loop": len(inner), "around": len(around) - len(inner), "tokens": loaded / row_bytes, "products": sum(i.name.startswith(product) for i in inner)}


def tensor_rows(labels: tuple[str, ...] = TENSOR, arch: str = "90") -> list[dict[str, object]]:
    made = []
    for label in labels:
        k, v = label.split("/") if "/" in label else (label, label)
        row_bytes = DIM * (FORMATS[k].bits + FORMATS[v].bits) // 8
        for name, listing in listings("cuda/tensor_kernels.cu", KERNEL_FORMATS[label], arch).items():
            if f"Li{DIM}E" not in name:
                continue
            found = count(listing, "HMMA", row_bytes)
            per_token = found["loop"] / found["tokens"] + found["around"] / UNIT
            made.append({"format": label, "arch": f"sm_{arch}", "query_rows": int(re.search(r"Li(8|16)EEE", name)[1]), "tokens": int(found["tokens"]),
                         "loop": found["loop"], "of which HMMA": found["products"], "around, per page or group": found["around"],
                         "per_token_and_head": round(per_token, 1), "budget": BUDGET.get(label)})  # fmt: skip
    return made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ops.sass")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args(argv)
    rows = tensor_rows()
    print_table(f"Instructions of a warp for a token and kv head, {DIM} columns", rows)
    write_json(args.json, "sass", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
