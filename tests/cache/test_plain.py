"""Plain decode steps answer as the way of replicated requests does, bit for bit, and leave the same cache behind; others are not served."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from tests.harness.driver import Driver, layer, ragged
from tests.harness.invariants import check
from tests.held import paths

LAYERS = [layer(0), layer(1, window=11), layer(2)]


class Plainly(Driver):
    """Asks the plain way wherever it serves, but for the layers of `otherwise`."""

    def __init__(self, *args, otherwise: tuple[int, ...] = (), **options) -> None:
        self.otherwise, self.served = otherwise, 0
        super().__init__(*args, checks=[], **options)

    def _attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        steps = self.cache.plain(self.local)
        if steps is not None and i not in self.otherwise:
            out = steps.attend(i, q.squeeze(1), k.squeeze(1), v.squeeze(1), self.scale(q), None if i == 2 else ids)
            if out is not None:
                self.served += 1
                return out.unsqueeze(1), torch.empty(0)
        return super()._attend(i, q, k, v, None if i == 2 else ids, positions)


class Ordinarily(Plainly):
    """Never asks it."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options | {"otherwise": tuple(range(len(LAYERS)))})


def live(driver: Driver):
    """A life with everything that may come between plain steps. Yields what it was and the outputs."""
    decode = lambda: driver.forward(torch.ones(len(driver.lens), 1, dtype=torch.bool))  # noqa: E731
    driver.prefill([5, 3])
    for _ in range(25):
        yield "plain", decode()
    yield "other", driver.forward(ragged([4, 9]))
    yield "plain", decode()
    driver.select([1, 1, 0])
    yield "other", decode()
    for _ in range(9):
        yield "plain", decode()
    yield "other", driver.forward(torch.tensor([[True], [False], [True]]))
    driver.announce_crops()
    for _ in range(2):
        yield "plain", decode()
    driver.crop([n - 1 for n in driver.lens])
    yield "other", decode()
    driver.end_crops()
    for _ in range(9):
        yield "plain", decode()
    driver.select([2])
    yield "other", decode()
    driver.reset()
    driver.prefill([8])
    for _ in range(9):
        yield "plain", decode()


def test_old_memory_goes():
    """What was looked up of pages does not keep them after a reset, or after they grew."""
    driver = Plainly(LAYERS)
    driver.prefill([5, 3])
    for _ in range(8):
        driver.decode()
    old = driver.cache.pages.layers[0].nearest.pages
    watched = weakref.ref(old)
    del old
    driver.reset()
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize(
    "codec, otherwise",
    [("none", ()), ("none", (0,)), ("none", (1,)), ("int8", ()), ("int4", ()), ("fp8_e4m3", ())],
    ids=lambda each: str(each),
)
def test_the_same_bits_and_the_same_cache(codec, otherwise):
    options = {"codec": codec, "page_size": 64 if codec in ("int8", "int4") else 4}
    plain, ordinary = Plainly(LAYERS, otherwise=otherwise, **options), Ordinarily(LAYERS, **options)
    for (kind, ours), (_, theirs) in zip(live(plain), live(ordinary), strict=True):
        for (out, _), (right, _) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(out, right, rtol=0, atol=0, equal_nan=True)
        assert plain.served == (len(LAYERS) - len(otherwise) if kind == "plain" else 0), kind
        plain.served = 0
        check(plain)
    assert ordinary.served == 0
    counts = [driver.cache.pages.counters.by_expert for driver in (plain, ordinary)]
    assert torch.equal(*counts) and counts[0].sum() > 0
    for ours, theirs in zip(plain.cache.pages.all_pools, ordinary.cache.pages.all_pools, strict=True):
        assert torch.equal(ours.table.counts, theirs.table.counts) and torch.equal(ours.table.ids, theirs.table.ids)
        for x, y in zip(*(pool.decoded(pool.table.ids[:, 0], pool.table.counts[:, 0], pool.tail) for pool in (ours, theirs)), strict=True):
            stored = torch.arange(x.shape[2]) < ours.table.counts[0]
            assert torch.equal(x[0, :, stored], y[0, :, stored])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    plain, ordinary = Plainly(LAYERS, dtype=dtype), Ordinarily(LAYERS, dtype=dtype)
    for (_, ours), (_, theirs) in zip(live(plain), live(ordinary), strict=True):
        assert all(torch.equal(out.nan_to_num(), right.nan_to_num()) for (out, _), (right, _) in zip(ours, theirs, strict=True))


def test_what_is_kept_outlives_inference_mode():
    plain, ordinary = Plainly(LAYERS), Ordinarily(LAYERS)
    for at, ((_, ours), (_, theirs)) in enumerate(zip(_in_turns(plain), live(ordinary), strict=True)):
        assert all(torch.equal(out.nan_to_num(), right.nan_to_num()) for (out, _), (right, _) in zip(ours, theirs, strict=True)), at
    kept = [path for path, tensor in paths(plain.cache) if tensor.is_inference() and "Counters" not in path]  # there it is the caller's
    assert not kept, kept


def _in_turns(driver: Driver):
    """Every other forward of a life in inference mode."""
    steps, inside = live(driver), True
    while True:
        try:
            with torch.inference_mode(inside), torch.no_grad():
                found = next(steps)
        except StopIteration:
            return
        inside = not inside
        yield found


@pytest.mark.parametrize(
    "options",
    [
        {"num_shards": 2},
        {"expert_ids": "true"},
        {"routing": {"method": "bounds", "budget_pages": 20}},
        {"scheduling": {"method": "h2o", "budget_tokens": 80}},
        {"codec": "int4", "page_size": 64, "compression": {"raw_recent_tokens": 64}},
        {"codec": "svd", "page_size": 8, "compression": {"rank": 8}},
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_what_needs_more_is_not_served(options):
    driver = Plainly([layer(0)], **options)
    driver.prefill([5, 3])
    for _ in range(3):
        driver.decode()
    assert driver.served == 0


def test_no_expert_is_the_position_modulo_their_number():
    """Entries without an expert count for position modulo E, when they are added up."""
    driver = Plainly([layer(0), layer(1), layer(2)], num_experts=4)
    driver.prefill([1])
    before = driver.cache.pages.counters.by_expert.clone()
    for _ in range(8):
        driver.decode()
    by_expert = driver.cache.pages.counters.by_expert - before
    assert int(by_expert.sum()) == 3 * 8
    driver.skewed = True
    before = driver.cache.pages.counters.by_expert.clone()
    for _ in range(4):
        driver.decode()
    assert (driver.cache.pages.counters.by_expert - before).tolist() == [4 + 4 + 1, 1, 1, 1]  # two layers say 0, the third nothing


def test_nothing_is_opened_twice(monkeypatch):
    opened = []
    plain = PiKVCache.open
    monkeypatch.setattr(PiKVCache, "open", lambda self, *args: (opened.append(1), plain(self, *args))[1])
    driver = Plainly(LAYERS, otherwise=(1,))
    driver.prefill([5, 3])
    opened.clear()
    driver.decode()
    assert opened == [1] and driver.served == 2
