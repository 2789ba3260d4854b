"""page_bounds, page_score: no key escapes its page's bounds, no logit its page's score; compiled versions give the reference's bits."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds import ops
from pikv_ds.ops.format.bound_codes import decode_box, encode_box
from pikv_ds.ops.format.formats import FORMATS, PageFormat
from tests.ops.cases import IMPLEMENTATIONS, call
from tests.ops.grown import Grown, P

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "int8": torch.int8}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", list(FORMATS))
def test_no_key_escapes_and_nothing_is_wider_than_it_must_be(name, dtype):
    grown = Grown(name, DTYPES[dtype])
    for count in (1, 3, 70, 1, 200, 5):
        grown.step(count)
    slack = 0.0 if not FORMATS[name].levels else 6.0 / grown.fmt.traits.levels  # the codes beside the raw keys they replace
    slack += {"f32": 0.0, "bf16": 2.0**-7, "f16": 2.0**-10, "int8": 0.0}[dtype]
    for n in range(2):
        keys = grown.keys(n)
        for column in range(-(-grown.lens[n] // P)):
            page = keys[:, column * P : (column + 1) * P]
            low, high = decode_box(grown.bounds[grown.table[n, column]]).unbind(1)
            assert (low.unsqueeze(1) <= page).all() and (page <= high.unsqueeze(1)).all(), f"a key escapes from column {column}"
            for found, edge in ((low, page.amin(1)), (high, page.amax(1))):
                step = edge.abs().amax(-1, keepdim=True) / 125 if dtype == "int8" else 0  # a bf16 scale is up to 1 / 128 too large
                assert ((found - edge).abs() <= slack * (1 + edge.abs()) + step).all(), f"column {column} is too wide"
    untouched = [page for n in range(2) for page in grown.table[n, -(-grown.lens[n] // P) :].tolist()]
    kept = grown.bounds[untouched] == -1 if dtype == "int8" else grown.bounds[untouched].isnan()
    assert untouched and kept.all(), "an append touches the bounds of its own pages only"


KINDS = [(name, latent) for name in FORMATS for latent in (False, True)] + [("int4+rope", True), ("fp4_e2m1+rope", True)]


@pytest.mark.parametrize("compiled", ["baseline", "emu"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("name", "latent"), KINDS)
def test_same_bits_as_the_reference(name, dtype, latent, compiled, monkeypatch):
    stores = {which: Grown(name, DTYPES[dtype], latent=latent, v_dim=24 if latent else None) for which in ("torch", compiled)}
    for step, count in enumerate((1, 3, 70, 1, 300, 5)):
        for which, grown in stores.items():
            grown.step(count, partial(call, "page_bounds", which, monkeypatch), scale=10.0 ** (step - 2))
        bits = [grown.bounds.view(torch.uint8) for grown in stores.values()]
        assert torch.equal(*bits), f"bounds differ after a step of {count}"


def test_a_page_that_is_used_again_starts_anew():
    fmt = PageFormat("fp32", 1, 8, 8, 4)
    pages, bounds = ops.new_pages(fmt, 2), torch.full((2, 1, 2, 8), torch.nan)
    for value in (100.0, 1.0):
        slots = torch.tensor([1, 0], dtype=torch.int32)
        k = torch.tensor([value, -value]).view(2, 1, 1).expand(2, 1, 8).contiguous()
        ops.append(pages, fmt, k, k, slots, slots)
        ops.page_bounds(bounds, pages, fmt, slots)
        assert bounds[0, 0].tolist() == [[-value] * 8, [value] * 8] and bounds[1].isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", ["heads", "shards", "head tables"])
@pytest.mark.parametrize("spread", [None, 0.25])
def test_scores_against_loops(spread, shape, dtype, implementation, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    bound_heads, table_heads, N = {"heads": (3, 1, 4), "shards": (3, 1, 8), "head tables": (1, 3, 4)}[shape]
    bounds = torch.stack((draw(9, bound_heads, 40), draw(9, bound_heads, 40)), 2).sort(2).values
    bounds = encode_box(bounds) if dtype == "int8" else bounds.to(DTYPES[dtype])
    q = draw(4, 6, 40).to(torch.float32 if dtype == "int8" else DTYPES[dtype])
    seqlens = torch.tensor([0, 1, 16, 17, 48, 33, 2, 31], dtype=torch.int32)[:N].view(N, 1).expand(N, table_heads).contiguous()
    table = torch.randint(9, (N, table_heads, 4), generator=generator).int()
    unused = torch.arange(4) >= (seqlens.unsqueeze(-1) + 15) // 16
    table[unused] = 1 << 30  # must not be read
    width = None if spread is None else spread * q.abs()
    found = call("page_score", implementation, monkeypatch, q, bounds, table, seqlens, width, 16, 0.3)
    for n in range(N):
        for h in range(3):
            for c in range(4):
                if unused[n, h % table_heads, c]:
                    assert found[n, h, c] == -torch.inf
                    continue
                low, high = decode_box(bounds[table[n, h % table_heads, c], h % bound_heads]).double()
                own = 0.3 * q[n // (N // 4), 2 * h : 2 * h + 2].double()
                expected = torch.maximum(own * low, own * high).sum(-1).max()
                if spread is not None:
                    around = (0.3 * width[n // (N // 4), 2 * h : 2 * h + 2].double()) * (high - low) / 2
                    expected = (own * (low + high) / 2 + around).sum(-1).max()
                assert abs(found[n, h, c] - expected) < 1e-4, f"table {n}, head {h}, column {c}"


@settings(max_examples=40)
@given(
    st.sampled_from(list(FORMATS)), st.sampled_from(list(DTYPES)), st.integers(0, 2**32), st.floats(-2, 6),
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
)  # fmt: skip
def test_no_logit_exceeds_the_score_of_its_page(name, dtype, seed, log_scale, steps):
    """Also where keys leave fp16's range and an fp16 bound becomes infinite (fp16 pages themselves cannot hold such keys)."""
    grown = Grown(name, DTYPES[dtype], seed=seed)
    for count in steps:
        grown.step(count, scale=10.0 ** min(log_scale, 4 if name == "fp16" else 6))
    q = torch.randn(2, 8, 32, generator=grown.generator)
    q[:, ::3, ::5] = 0
    seqlens = torch.tensor(grown.lens, dtype=torch.int32).view(2, 1)
    scores = ops.page_score(q, grown.bounds, grown.fmt, grown.table.int().unsqueeze(1), seqlens, scale=0.25)
    assert not scores.isnan().any()
    for n in range(2):
        logits = 0.25 * torch.einsum("hgd,hld->hgl", q[n].view(2, 4, 32).double(), grown.keys(n).double())
        for column in range(-(-grown.lens[n] // P)):
            page = logits[..., column * P : (column + 1) * P].amax((1, 2))
            assert (page <= scores[n, :, column] + 1e-5 * page.abs() + 1e-30).all(), f"column {column}: {page} > {scores[n, :, column]}"
        assert (scores[n, :, -(-grown.lens[n] // P) :] == -torch.inf).all()


@settings(max_examples=60)
@given(st.integers(-46, 37), st.integers(1, 130), st.integers(0, 2**32))
def test_the_decoded_box_holds_the_box(exponent, width, seed):
    """To the last bit, subnormal numbers included; and no bound is off by more than a step."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(50, 5, width, generator=generator) * 10.0**exponent
    box = torch.stack((keys.amin(1), keys.amax(1)), 1)
    found = decode_box(encode_box(box))
    # A box a bit larger than one that its codes hold exactly: quotients round to the whole number inside it.
    beyond = torch.nextafter(found, torch.tensor([-torch.inf, torch.inf]).view(2, 1))
    wider = torch.where(found.abs() == found.abs().amax(-1, keepdim=True), found, beyond)
    for held in (box, wider):
        low, high = decode_box(encode_box(held)).unbind(1)
        assert (low <= held[:, 0]).all() and (high >= held[:, 1]).all()
    if exponent > -30:
        assert ((found - box).abs() <= box.abs().amax(-1, keepdim=True) / 125).all()


@pytest.mark.parametrize("which", ["baseline", "emu"])
def test_compiled_versions_encode_the_same_at_the_edges(which, monkeypatch):
    """Pages of two keys, a box and one a last bit wider than what its codes hold, over the range of f32."""
    fmt, generator = PageFormat("fp32", 1, 40, 40, 4), torch.Generator().manual_seed(0)
    box = torch.randn(90, 2, 40, generator=generator).sort(1).values * torch.logspace(-44, 37, 90).view(90, 1, 1)
    found = decode_box(encode_box(box))
    beyond = torch.nextafter(found, torch.tensor([-torch.inf, torch.inf]).view(2, 1))
    box = torch.cat((box, torch.where(found.abs() == found.abs().amax(-1, keepdim=True), found, beyond), torch.zeros(1, 2, 40)))
    slots = (4 * torch.arange(181).unsqueeze(1) + torch.arange(2)).flatten().int()
    pages, bounds = ops.new_pages(fmt, 181), torch.zeros(181, *ops.bounds_shape(fmt, torch.int8), dtype=torch.int8)
    k = box.view(362, 1, 40)
    ops.append(pages, fmt, k, k, slots, slots)
    call("page_bounds", which, monkeypatch, bounds, pages, slots, None, None, *fmt.layout)
    assert torch.equal(bounds.squeeze(1), encode_box(box))


def test_infinite_keys_keep_their_page_in_the_box():
    box = torch.tensor([[1.0, -torch.inf, 0.0, 3e38], [2.0, 1.0, torch.inf, 3e38]])
    found = decode_box(encode_box(box))
    assert not found.isnan().any() and (found[0] <= box[0].clamp_min(-3e38)).all() and (found[1] >= box[1].clamp_max(3e38)).all()
    assert decode_box(encode_box(torch.zeros(2, 8))).eq(0).all()


@pytest.mark.parametrize("which", ["torch", "baseline", "emu"])
@pytest.mark.parametrize(("name", "dim"), [("fp32", 32), ("bf16", 128), ("int8", 32), ("int4", 128)])
def test_int8_bounds_do_not_depend_on_how_the_keys_came(name, dim, which, monkeypatch):
    """A page that fills one key at a time has the bits of one that is written at once: no rounding adds up."""
    fmt = PageFormat(name, 2, dim, dim, P)
    k = torch.randn(P, 2, dim, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, P).view(P, 1, 1)  # the scale grows
    slots, found = torch.arange(P, P + P, dtype=torch.int32), []
    for step in (1, 7, P):
        pages, bounds = ops.new_pages(fmt, 2), torch.full((2, *ops.bounds_shape(fmt, torch.int8)), -1, dtype=torch.int8)
        tail = torch.zeros(1, 2, fmt.group, dim) if fmt.grouped else None
        for part in torch.arange(P).split(step):
            rows = torch.zeros(part.numel(), dtype=torch.int32) if fmt.grouped else None
            extra = {"tail": tail, "tail_rows": rows} if fmt.grouped else {}
            ops.append(pages, fmt, k[part], k[part], slots[part], slots[part], **extra)
            call("page_bounds", which, monkeypatch, bounds, pages, slots[part], tail, rows, *fmt.layout)
        found.append(bounds)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    keys = ops.decode_pages(pages, fmt)[0][1]
    low, high = decode_box(found[0][1]).unbind(1)
    assert (low <= keys.amin(1)).all() and (high >= keys.amax(1)).all() and (found[0][0] == -1).all()


def test_int8_bounds_choose_the_pages_of_f32_bounds():
    """Keys with columns of unlike size, as models have them: the best eighth of 256 pages of 4."""
    generator = torch.Generator().manual_seed(0)
    fmt = PageFormat("bf16", 2, 64, 64, 4)
    spread = torch.logspace(-1, 0.7, 64)
    topic = torch.randn(256, 1, 2, 64, generator=generator).repeat_interleave(4, 1).flatten(0, 1)
    k = (topic + 0.5 * torch.randn(1024, 2, 64, generator=generator)) * spread
    pages, slots = ops.new_pages(fmt, 256), torch.arange(1024, dtype=torch.int32)
    ops.append(pages, fmt, k, k, slots, slots)
    q = torch.randn(16, 2, 64, generator=generator)
    table, seqlens = torch.arange(256, dtype=torch.int32).expand(16, 1, 256).contiguous(), torch.full((16, 1), 1024, dtype=torch.int32)
    best = []
    for dtype in (torch.float32, torch.int8):
        bounds = torch.zeros(256, *ops.bounds_shape(fmt, dtype), dtype=dtype)
        ops.page_bounds(bounds, pages, fmt, slots)
        best.append(ops.page_score(q, bounds, fmt, table, seqlens, scale=0.125, width=0.4 * q.abs()).topk(32, -1).indices)
    common = (best[0].unsqueeze(-1) == best[1].unsqueeze(-2)).any(-1).float().mean().item()
    print(common)
    assert common > 0.9


def test_the_best_pages_by_score_hold_the_attention():
    """What the scores are for: a quarter of the pages, chosen by score, holds nearly all of a peaked attention; the worst quarter none."""
    generator = torch.Generator().manual_seed(0)
    fmt = PageFormat("bf16", 1, 64, 64, 16)
    topic = torch.randn(16, 1, 64, generator=generator)  # each page has its own
    k = (topic + 0.1 * torch.randn(16, 16, 64, generator=generator)).view(256, 1, 64)
    pages, bounds = ops.new_pages(fmt, 16), torch.empty(16, 1, 2, 64)
    slots = torch.arange(256, dtype=torch.int32)
    ops.append(pages, fmt, k, k, slots, slots)
    ops.page_bounds(bounds, pages, fmt, slots)
    q = 4 * topic[5].view(1, 1, 64)
    table, seqlens = torch.arange(16, dtype=torch.int32).view(1, 1, 16), torch.tensor([[256]], dtype=torch.int32)
    scores = ops.page_score(q, bounds, fmt, table, seqlens, scale=0.125)
    _, whole, _ = ops.decode(q, pages, fmt, table, seqlens, scale=0.125)
    mass = {}
    for best in (True, False):
        listed = scores.topk(4, -1, largest=best).indices.int()
        _, lse, _ = ops.decode(q, pages, fmt, table, seqlens, scale=0.125, page_list=listed)
        mass[best] = (lse - whole).exp().item()
    print(mass)
    assert mass[True] > 0.99 and mass[False] < 0.01
