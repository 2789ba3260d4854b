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
from pathlib import Path

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.ops.build import ptxas
from pikv_ds.ops.build.compile import CSRC
from pikv_ds.ops.build.cuda_build import nvcc
from pikv_ds.ops.format.formats import FORMATS
from pikv_ds.ops.format.kernels import TENSOR, tensor_kernels
from pikv_ds.ops.nvrtc.compiler import TENSOR_FILES

DIM, UNIT = 128, 64
# Instructions for a token and head, DIM columns, 8 query rows.
BUDGET = {"bf16": 14, "fp16": 14, "int8": 30, "fp8_e4m3": 30, "int4": 32, "fp4_e2m1": 32}
BEFORE = {
    "bf16": 128,
    "int8": 171,
    "int4": 185,
    "fp8_e4m3": 168,
}  # of the fp32 tier, 4 query rows, counted by hand before there was another
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
        return not self.predicate and (
            self.name in ("EXIT", "RET") or (self.target is not None and "P" not in self.arguments.split("`")[0])
        )


Block = list[Instruction]


def disassembler() -> str | None:
    """nvdisasm: NVDISASM, beside nvcc, in the path, or of the package nvidia-cuda-nvdisasm; None = there is none."""
    given = os.environ.get("NVDISASM") or shutil.which("nvdisasm")
    folders = [Path(shutil.which(nvcc()) or "/").resolve().parent, *Path("/usr/local").glob("cuda*/bin")]
    folders += [path for root in sys.path for path in Path(root).glob("nvidia/cu*/bin")]
    return given or next((str(folder / "nvdisasm") for folder in folders if (folder / "nvdisasm").is_file()), None)


def listings(kernels: list[str], arch: str = "90") -> dict[str, str]:
    """Of tensor-core kernels, as ops/format/kernels.py names them -> its listing. One compilation."""
    headers = (
        "include/page_format.h",
        *(f"kernels/{name}.cuh" for name in ("params", "common", "numbers", *TENSOR_FILES)),
    )
    text = "#include <cstdint>\n" + "".join(f'#include "{CSRC / name}"\n' for name in headers)
    text += "".join(f"template __global__ void pikv::{kernel}(const pikv::Attend);\n" for kernel in kernels)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(text)
        flags = ("-O3", "-std=c++17", "-cubin", "-Xptxas=-v", f"-gencode=arch=compute_{arch},code=sm_{arch}")
        done = subprocess.run([nvcc(), *flags, str(source), "-o", str(cubin)], check=True, capture_output=True, text=True, timeout=600)
        spilled = [use for use in ptxas.parse(done.stdout + done.stderr) if use.breach()]
        if spilled:
            raise RuntimeError("; ".join(f"{use.kernel}: {use.breach()}" for use in spilled))
        listing = subprocess.run([disassembler(), "-c", str(cubin)], check=True, capture_output=True, text=True, timeout=600).stdout
    parts = re.split(r"\.section\s+\.text\.(\w+)", listing)
    mangled = {f"attend_tensor_kernelI{''.join(f'Li{n}E' for n in re.findall(r'[0-9]+', kernel))}E": kernel for kernel in kernels}
    return {kernel: text for name, text in zip(parts[1::2], parts[2::2], strict=True) for key, kernel in mangled.items() if key in name}


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
    return sum(i.name.startswith(product) or ".NA" in i.name for i in block)


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


def count(listing: str, product: str, row_bytes: int) -> dict[str, float | None]:
    """Instructions of the loop over the tiles and of what lies around it for a page or group (None: no such loop was found), the tokens of
    a tile: of its loads, each byte of a token is loaded once."""
    blocks, follow = blocks_of(listing)
    nest = [(head, body) for head, body in loops(follow) if any(i.name.startswith(product) for at in body for i in blocks[at])]
    inner = way_through(blocks, follow, *nest[0], product)
    # The last is that over the parts. In the code of sm_80 the loops around may close in ways that are not followed here.
    around = way_through(blocks, follow, *nest[-2], product) if len(nest) > 1 else None
    loaded = sum(512 if ".128" in i.name else 256 if ".64" in i.name else 128 for i in inner if ".NA" in i.name)  # of 32 lanes
    return {
        "loop": len(inner),
        "around": len(around) - len(inner) if around else None,
        "tokens": loaded / row_bytes,
        "products": sum(i.name.startswith(product) for i in inner),
    }


def rows(labels: tuple[str, ...] = TENSOR, arch: str = "90") -> list[dict[str, object]]:
    of = {kernel: label for label in labels for kernel in tensor_kernels(label) if f", {DIM}, " in kernel}
    made = []
    for kernel, listing in listings(list(of), arch).items():
        k, _, v = of[kernel].partition("/")
        found = count(listing, "HMMA", DIM * (FORMATS[k].bits + FORMATS[v or k].bits) // 8)
        per_token = found["loop"] / found["tokens"] + (found["around"] or 0) / UNIT
        label, eight = of[kernel], kernel.endswith(" 8>")
        budget = BUDGET.get(label) if eight and found["around"] is not None else None
        made.append({"format": label, "kernel": kernel, "arch": f"sm_{arch}", "tokens_of_a_tile": int(found["tokens"]),
                     "tile": found["loop"], "of_which_products": found["products"], "around": found["around"],
                     "per_token_and_head": round(per_token, 1), "budget": budget,
                     "before": BEFORE.get(label) if eight else None})  # fmt: skip
    return made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ops.sass")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args(argv)
    made = rows(arch="90") + rows(arch="80")
    print_table(f"Instructions of a warp for a token and kv head, {DIM} columns", made)
    write_json(args.json, "sass", made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
