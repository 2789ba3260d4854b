"""Instructions of the kernels on tensor cores; the record: python -m tests.ops.sass --json docs/results/sass.json."""

import json
import shutil
from pathlib import Path

import pytest

from pikv_ds.ops.build.cuda_build import nvcc
from tests.ops import sass

RECORD = Path(__file__).resolve().parents[2] / "docs" / "results" / "sass.json"


@pytest.mark.skipif(shutil.which(nvcc()) is None or sass.disassembler() is None, reason="nvcc or nvdisasm is not installed")
@pytest.mark.timeout(600)
def test_budgets():
    rows = [row for row in sass.rows(tuple(sass.BUDGET)) if row["budget"]]
    assert rows and not [row for row in rows if row["per_token_and_head"] > row["budget"]], rows


def test_the_record_keeps_the_budgets():
    rows = json.loads(RECORD.read_text())["rows"]
    assert {row["format"] for row in rows if row["budget"]} == set(sass.BUDGET)
    assert not [row for row in rows if row["budget"] and row["per_token_and_head"] > row["budget"]]


LISTING = """
.text.k:
        /*0000*/                   MOV R1, RZ ;
.L_x_0:
        /*0010*/                   MOV R4, RZ ;
.L_x_1:
        /*0020*/                   LDG.E.NA.128.CONSTANT R4, [R2] ;
        /*0030*/                   LDG.E.NA.64.CONSTANT R8, [R2] ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/                   FADD R1, R1, R1 ;
        /*0060*/                   FADD R1, R1, R1 ;
.L_x_2:
        /*0070*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/               @P3 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3) ;
"""


def test_the_way_through_a_loop():
    """What may be left out is not counted; loads and products are; the loop around it has one instruction and a branch more."""
    blocks, follow = sass.blocks_of(LISTING)
    inner, outer = sass.loops(follow)[:2] if len(sass.loops(follow)[0][1]) > 1 else sass.loops(follow)[1:3]
    names = lambda loop: [i.name for i in sass.way_through(blocks, follow, *loop, "HMMA")]  # noqa: E731
    tile = ["LDG.E.NA.128.CONSTANT", "LDG.E.NA.64.CONSTANT", "BRA", "HMMA.16816.F32", "BRA"]
    assert names(inner) == tile and names(outer) == ["MOV", *tile, "BRA"]
