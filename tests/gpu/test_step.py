"""A decode step on a device: captured in a CUDA graph and replayed with other lengths, and without a wait for the device."""

import pytest
import torch

from pikv_ds import ops
from pikv_ds.ops import library
from pikv_ds.ops.build import load
from pikv_ds.ops.format.formats import FORMATS
from tests.gpu.marks import gpu

R, H, G, D, P, PAGES = 4, 2, 4, 128, 64, 40


class Step:
    """append, page_bounds, page_score, decode, merge and pack of one token per request, on buffers that stay where they are."""

    def __init__(self, name: str, device: str = "cuda") -> None:
        self.fmt = ops.PageFormat(name, H, D, D, P)
        self.generator = torch.Generator().manual_seed(0)
        self.pages = ops.new_pages(self.fmt, PAGES).to(device)
        self.table = torch.randperm(PAGES, generator=self.generator).view(R, 1, -1).int().to(device)
        self.lens = torch.zeros(R, 1, dtype=torch.int32, device=device)
        self.bounds = torch.zeros(PAGES, H, 2, D, device=device)
        self.q, self.k, self.v = (torch.zeros(R, n, D, dtype=torch.bfloat16, device=device) for n in (H * G, H, H))
        self.slots = torch.full((R,), -1, dtype=torch.int32, device=device)
        self.record = torch.zeros(R, H * G * (D + 1) * 4, dtype=torch.uint8, device=device)
        rows = torch.arange(R, dtype=torch.int32, device=device)
        self.rows = rows
        self.extra = {"tail": torch.zeros(R, H, 64, D, dtype=torch.bfloat16, device=device), "tail_rows": rows} if self.fmt.grouped else {}

    def set(self, lens: list[int]) -> None:
        """New inputs, in place: each request gets its next token at position lens[r]. What is stored so far stays."""
        draw = lambda x: x.copy_(torch.randn(x.shape, generator=self.generator))  # noqa: E731
        draw(self.q), draw(self.k), draw(self.v)
        table = self.table.cpu()
        self.slots.copy_(torch.tensor([int(table[r, 0, n // P]) * P + n % P for r, n in enumerate(lens)]))
        self.lens.copy_(torch.tensor(lens).view(R, 1) + 1)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        fmt, positions = self.fmt, self.lens.flatten() - 1
        ops.append(self.pages, fmt, self.k, self.v, positions, self.slots, **self.extra)
        ops.page_bounds(self.bounds, self.pages, fmt, self.slots, **self.extra)
        scores = ops.page_score(self.q, self.bounds, fmt, self.table, self.lens, scale=0.1)
        best = scores.topk(3, -1).indices.int()
        options = {"scale": 0.1, "q_positions": positions, "window": 100, **self.extra}
        whole = ops.decode(self.q, self.pages, fmt, self.table, self.lens, **options)
        some = ops.decode(self.q, self.pages, fmt, self.table, self.lens, page_list=best, num_splits=2, **options)
        merged = ops.merge(torch.stack([whole[0], some[0]]), torch.stack([whole[1], some[1]]))
        fields = [merged[0].flatten(1), merged[1]]
        ops.pack(self.record, fields, offsets=[0, 4 * H * G * D], strides=[self.record.shape[1]] * 2, rows=[R] * 2, index=self.rows)
        return merged


def _fill(step: Step, lens: list[int]) -> None:
    for length in range(max(lens)):
        step.set([min(length, n - 1) for n in lens])
        step.run()


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_the_step_runs_on_the_host_too(name):
    """Whether or not there is a device: the program that the tests below capture and watch is right."""
    step = Step(name, "cpu")
    _fill(step, [1, 70, 65, 3])
    out, lse = step.run()
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    assert torch.equal(step.record.view(torch.float32)[:, : H * G * D], out.flatten(1))


@gpu
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_replayed_graph_is_the_eager_step(name):
    load.load_cuda()
    graphed, eager = Step(name), Step(name)
    for step in (graphed, eager):
        _fill(step, [1, 70, 65, 3])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = [x.clone() for x in (graphed.pages, graphed.bounds, *graphed.extra.values())]
    with torch.cuda.stream(stream):
        graphed.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = graphed.run()
    for x, kept in zip((graphed.pages, graphed.bounds, *graphed.extra.values()), before, strict=True):
        x.copy_(kept)
    for lens in ([1, 70, 65, 3], [2, 71, 66, 63], [3, 127, 128, 64], [640 - 1, 0, 129, 65]):
        for step in (graphed, eager):
            step.set(lens)
        graph.replay()
        expected = eager.run()
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]), lens
        for x, y in ((graphed.pages, eager.pages), (graphed.bounds, eager.bounds), (graphed.record, eager.record)):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), lens


@gpu
@pytest.mark.parametrize("name", list(FORMATS))
def test_no_op_waits_for_the_device(name):
    load.load_cuda()
    step = Step(name)
    _fill(step, [1, 70, 65, 3])
    state = [torch.zeros(R, 1, dtype=torch.int32), torch.full((R, 1, 8), -1, dtype=torch.int32), torch.arange(PAGES + 1).int(),
             torch.tensor(PAGES), torch.zeros(PAGES + 1, dtype=torch.int32), torch.arange(R)]  # fmt: skip
    state = [x.cuda() for x in state]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
        torch.ops.pikv.assign_slots(*state, None, None, P, True, True)
        torch.ops.pikv.migrate(step.pages, step.pages.clone(), step.rows, step.rows)
        asked = step.lens.expand(R, 2).contiguous()
        tail = [step.extra.get(key) for key in ("tail", "tail_rows")]
        q = step.q.unsqueeze(1).expand(R, 2, H * G, D).contiguous()
        torch.ops.pikv.prefill_cached(q, step.pages, step.table, step.lens, asked, *tail, *library.layout(step.fmt), 0.1, 0, True, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_no_step_of_a_model_waits_for_the_device(family):
    """From hook to hook, with and without a window; tests/device counts the same on any machine, over more configurations."""
    import pikv_ds
    from tests.tiny_models import prompt, tiny_model

    model, ids = tiny_model(family).cuda(), prompt(21, seed=2).cuda()
    model.set_experts_implementation("batched_mm")
    with torch.no_grad(), pikv_ds.attach(model, {"page_size": 4}) as cache:
        model(ids, past_key_values=cache)
        for _ in range(5):
            model(ids[:, :1], past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(12):
                model(ids[:, :1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
