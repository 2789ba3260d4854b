"""The bytes of docs/results/compression.md for DeepSeek-V3's latents are those a store allocates."""

import re
from pathlib import Path

import torch

from pikv_ds.codecs import CODECS
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.raw import RawReader
from pikv_ds.spec import LayerSpec

LATENT = LayerSpec(layer_idx=0, num_kv_heads=1, k_dim=576, v_dim=512, latent=True)
CONTEXT = 4096


def allocated(codec) -> list[str]:
    """Record, everything, and 1,152 over it, per token, as the table prints them."""
    page_size, tokens = codec.page_size(None), torch.arange(CONTEXT)
    fmt = codec.page_format(LATENT, page_size, torch.bfloat16)
    pool = PagePool(fmt, torch.bfloat16, torch.zeros(1, 1, dtype=torch.int32), torch.zeros((), dtype=torch.int64), RawReader)
    pool.reserve(0, CONTEXT // page_size, CONTEXT // page_size)
    k, v = torch.randn(CONTEXT, 1, 576).bfloat16(), torch.zeros(CONTEXT, 1, 0).bfloat16()
    pool.append(tokens * 0, None, tokens >= 0, tokens.int(), k, v, one_per_row=False, may_open=True, all_valid=True)
    assert int(pool.table.counts.sum()) == CONTEXT and pool.num_pages == CONTEXT // page_size
    return [f"{fmt.bytes_per_token:,.0f}", f"{pool.nbytes / CONTEXT:,.0f}", f"{1152 / (pool.nbytes / CONTEXT):.2f}"]


def test_the_table_of_latents():
    text = (Path(__file__).parents[2] / "docs/results/compression.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]*) ?\| ([\d,]*) ?\| ([\d.]*) ?\|$", text, re.MULTILINE)
    assert {row[0] for row in rows} == {"none", "int8", "fp8_e4m3", "int4", "fp4_e2m1", "int2"}
    for name, *numbers in rows:
        wide = CODECS.build(name)
        assert numbers[:3] == allocated(wide)
        assert numbers[3:] == (["", "", ""] if wide.lossless else allocated(CODECS.build(name, rope_raw=False)))
