"""OpenVINO's PagedAttention as the only node of a model on the CPU plugin. Each call also writes its one token: under 1 % of its time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .data import DIM, GROUP, HEADS, Data
from .worker import Case, serve

if TYPE_CHECKING:
    import openvino

BLOCK = 32  # the only one on a CPU
AT_ONCE = 64  # blocks that are filled by one call, each as a sequence of its own
KINDS = {"bf16": ("bf16", "bf16"), "fp32": ("f32", "f32"), "u8": ("u8", "f32"), "u4": ("u4", "f32")}  # of the cache, of the arithmetic
CACHES = ("key_cache.0", "value_cache.0")


def cases(given: Data, threads: int) -> Iterator[Case]:
    import openvino

    plugins, model = openvino.Core(), _model()
    for name, (kept, arithmetic) in KINDS.items():
        options = {
            "KV_CACHE_PRECISION": kept, "INFERENCE_PRECISION_HINT": arithmetic, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        yield _case(name, plugins.compile_model(model, "CPU", options), given)


def _model() -> openvino.Model:
    from openvino import Model, PartialShape, Type, opset13
    from openvino.op import _PagedAttentionExtension as PagedAttention

    def asked(name: str, shape: list[int], kind: Type):
        node = opset13.parameter(PartialShape(shape), kind)
        node.get_output_tensor(0).set_names({name})
        node.set_friendly_name(name)
        return node

    def fixed(value: object, kind: Type):
        return opset13.constant(np.array(value), kind)

    def none(kind: type, dims: int = 1):
        return opset13.constant(np.zeros((0,) * dims, kind))

    tokens = [asked("q", [-1, HEADS * GROUP * DIM], Type.f32), *(asked(x, [-1, HEADS * DIM], Type.f32) for x in "kv")]
    caches = [asked(name, [-1, HEADS, -1, -1], Type.dynamic) for name in CACHES]
    places = [asked(name, [-1], Type.i32) for name in ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")]
    longest = asked("max_context_len", [], Type.i32)
    inputs = [*tokens, *caches, *places]
    inputs += [fixed(DIM**-0.5, Type.f32), fixed(0, Type.i32), none(np.float32), longest]  # scale, window, alibi slopes
    # Nothing is aggregated, rotated, sparse or adaptive. A scalar in place of a tensor of rank 1 gives stale output for several requests.
    inputs += [none(np.int32), none(np.int32), none(np.int32, 2), none(np.float32, 2), none(np.float32)]
    inputs += [
        fixed(64, Type.i32),
        fixed(8, Type.i32),
        none(np.float32, 4),
        fixed(0, Type.i32),
        *(none(np.int32) for _ in range(4)),
        none(np.uint8),
        none(np.int32),
    ]
    attention = PagedAttention([node.output(0) for node in inputs])
    for name, value in {"num_k_heads": HEADS, "k_head_size": DIM, "num_v_heads": HEADS, "v_head_size": DIM}.items():
        attention.get_rt_info()[name] = value
    return Model([attention.output(0)], [*tokens, *caches, *places, longest], "paged_attention")


def _case(name: str, compiled: openvino.CompiledModel, given: Data) -> Case:
    import openvino
    from openvino import Shape, Tensor

    batch, context = given.k.shape[:2]
    blocks = batch * context // BLOCK
    kinds = {port.get_any_name(): (port.get_element_type(), port.get_partial_shape()) for port in compiled.inputs}
    caches = {}
    for cache in CACHES:
        kind, shape = kinds[cache]
        caches[cache] = Tensor(kind, Shape([blocks, *(shape[i].get_length() for i in (1, 2, 3))]))
    request = compiled.create_infer_request()
    for cache, tensor in caches.items():
        request.set_tensor(cache, tensor)

    def ask(**values: object) -> None:
        for key, value in values.items():
            request.set_tensor(key, Tensor(np.ascontiguousarray(value) if np.ndim(value) else np.array(value)))

    def ends(count: int, step: int) -> np.ndarray:
        return np.arange(0, count * step + 1, step, dtype=np.int32)

    k, v = (x.reshape(batch * context, HEADS * DIM) for x in (given.k, given.v))
    ask(q=np.zeros((AT_ONCE * BLOCK, HEADS * GROUP * DIM), np.float32), past_lens=np.zeros(AT_ONCE, np.int32))
    ask(max_context_len=np.int32(BLOCK))
    ask(subsequence_begins=ends(AT_ONCE, BLOCK), block_indices_begins=ends(AT_ONCE, 1))
    for first in range(0, blocks, AT_ONCE):
        rows = slice(first * BLOCK, (first + AT_ONCE) * BLOCK)
        ask(k=k[rows], v=v[rows], block_indices=np.arange(first, first + AT_ONCE, dtype=np.int32))
        request.infer()
    ask(q=given.q.reshape(batch, -1), k=given.k[:, -1].reshape(batch, -1), v=given.v[:, -1].reshape(batch, -1))
    ask(past_lens=np.full(batch, context - 1, np.int32), subsequence_begins=ends(batch, 1), block_indices=np.arange(blocks, dtype=np.int32))
    ask(block_indices_begins=ends(batch, context // BLOCK), max_context_len=np.int32(context))
    note = f"PagedAttention {openvino.__version__.split('-')[0]}, blocks of {BLOCK}"
    nbytes = sum(tensor.byte_size for tensor in caches.values())
    return Case(f"OpenVINO {name}", request.infer, lambda: np.array(request.get_output_tensor(0).data), nbytes, note)


if __name__ == "__main__":
    serve(cases)
