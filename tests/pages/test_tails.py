"""Raw tails of grouped formats when rows fork and are cut: what was open stays raw, what was encoded comes back from its codes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds import ops
from pikv_ds.pages.recycle import fork
from pikv_ds.spec import LayerSpec
from tests.harness.pools import fill, make_pool

SPEC = LayerSpec(layer_idx=0, num_kv_heads=2, k_dim=16, v_dim=8)


def group_of(pool, table: int, first: int) -> torch.Tensor:
    """[Hkv, group, Dk]: the keys from entry `first` on, from their codes."""
    fmt = pool.fmt
    page = int(pool.table.ids.flatten(0, 1)[table, first // fmt.page_size])
    k, _ = ops.decode_pages(pool.pages[page : page + 1], fmt)
    return k[0, :, first % fmt.page_size :][:, : fmt.group]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_tails_follow_their_rows(data):
    rows, shards = 2, 2
    pool = make_pool(rows, shards, 64, SPEC, "int4")
    group = pool.fmt.group
    lens = [data.draw(st.integers(0, 3 * group)) for _ in range(rows * shards)]
    fill(pool, {(i // shards, i % shards): list(range(n)) for i, n in enumerate(lens) if n} or {(0, 0): [0]})
    counts, tail = pool.table.counts.flatten().tolist(), pool.tail.clone()
    parent = data.draw(st.lists(st.integers(-1, rows - 1), min_size=1, max_size=3))
    sources = [p * shards + s if p >= 0 else None for p in parent for s in range(shards)]
    kept = [0 if source is None else data.draw(st.integers(0, counts[source])) for source in sources]
    expected = []
    for source, keep in zip(sources, kept, strict=True):
        first = keep - keep % group
        if keep == first:
            expected.append(None)
        else:
            expected.append(group_of(pool, source, first).clone() if counts[source] >= first + group else tail[source])
    fork(pool, torch.tensor(parent), torch.tensor(kept, dtype=torch.int32).view(len(parent), shards))
    assert pool.tail.shape == (len(sources), *tail.shape[1:])
    for at, (keep, own) in enumerate(zip(kept, expected, strict=True)):
        if own is not None:
            assert torch.equal(pool.tail[at][:, : keep % group].float(), own[:, : keep % group].to(pool.tail.dtype).float()), (at, keep)
