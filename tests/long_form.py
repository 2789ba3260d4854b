"""The long form of the tests: `bash launch/test.sh --long`, or PIKV_TEST_LONG=1.

What it adds is said beside each use of LONG: products of things that the short form checks one by one. All of it:

- tests/ops/test_cuda_build.py, tests/ops/test_cuda_linking.py: the library with every kernel; short: with those that have most registers.
- tests/ops/test_torch_headers.py: a launcher by nvcc against the oldest torch too; short: all files by the C++ compiler.
- tests/ops/test_kernel_text.py: every bug planted on tensor cores, short: four; tests/ops/test_tensor_widths.py: every one planted in
  latents, short: three. Tensor-core kernels of all widths in the libraries, short: of 64 and 128 (tests/conftest.py).
- tests/ops/test_sanitize.py: the whole matrix, short: a third; tests/ops/test_blocks.py: all points in plain C++ too, short: a third.
- tests/dist/test_exact.py: rows that move and the bundled model on 4 ranks, and every family there, short: a window, a latent, sinks; every
  family x source of expert ids x placement, short: every placement with one family, and on 4 ranks that family; the error of bf16 over 16
  windows of text, short: 5.
- tests/dist/test_evict.py, tests/dist/test_selection.py: every policy and router on 4 ranks, short: one of each kind; all of them on 2.
- tests/device, tests/dist/test_host_stops.py: every configuration whose host stops are counted; short: four on one rank, one on two.
- tests/dist/test_mismatch.py: every way for ranks to be out of step, short: one of each sort; 300 random programs on 2 ranks and 150 on 3,
  short: 3.
- tests/retention/test_rows_alone.py, tests/dist/test_lone_rows.py: every policy, router and tier x fork, beams, drops, ragged rows, crops;
  on 2 ranks replicated and distinct; and the model's own calls. Short: one of each kind, and what is refused.
- tests/dist, tests/megatron: every rank is an interpreter of its own; short: forked with the imports done (tests/dist/warm.py).
- tests/adapters: engines, MoE layers and pairs of ranks under DeepSpeed's launcher; short: with the variables that it sets, while
  tests/adapters/test_deepspeed_launch.py starts it.
- tests/adapters/test_deepspeed_autotp.py: tensor parallelism on 4 ranks, a window, folded expert groups; short: 2 ranks and a latent.
  tests/adapters/test_launch_run.py: ds_report with our row and without; tests/launch/test_shm_buffers.py: a rank killed under our launcher.
- tests/launch/test_lm_eval.py: every style of task, also on 2 ranks and under Megatron; short: six of them on one rank.
- tests/survey: every family that the survey serves or refuses, short: one of each kind.
- tests/generate_options: every try of every option of generate(), and 2,000 random cases; short: those that need hooks, and 11.
- tests/adapters/test_many_caches.py: every kind of cache for a draft, short: three of seven; tests/dist/test_many_caches.py: four ways for
  ranks to have other numbers of prompts, short: one.
- tests/megatron/test_decode.py: 32 decode steps, short: 8; expert parallelism of 2 on 4 ranks, short: with tensor parallelism besides.
- tests/megatron/test_checkpoints.py: 4 samples of an evaluation, short: 2; ranks under torchrun, short: with the variables that it sets.
- tests/megatron/test_hybrid.py: three orders of layers, every source of ids, dynamic batching; short: one order, two sources.
- tests/megatron/test_dynamic_engine.py, tests/megatron/test_engine.py: Megatron's engines on 4 and 8 ranks with pipeline stages; short: on
  two ranks. tests/megatron/test_coordinator.py: behind the zmq coordinator of 0.16, and MegatronLLM with tensor and pipeline parallelism.
- tests/megatron/test_trained.py: checkpoints in four more layouts and on four and eight ranks, and the command; short: two ranks and one.
- tests/cache/test_modes.py, tests/cache/test_gradient.py: every case of the covering array; short: eight of each.
- tests/adapters/test_modes.py: torch.compile by three backends, the profiler, anomaly mode and save_on_cpu, short: the other modes;
  every choice of calls under inference mode, short: four.
- tests/serving/test_ranks.py: Megatron, AutoEP and three ranks under load; processes as a user starts them: signals, a rank that dies,
  lm-eval's local-completions. Short: two ranks under load. tests/serving/test_page.py: a browser.
- tests/migration/test_faults.py: 100 random faults, short: 12; tests/dist/test_moving.py: 15 configurations whose shards move, on 2 and 4
  ranks, short: four; a rank killed at every message, short: at two.
- tests/tiers/test_async_io.py: page files through DeepSpeed's op, where libaio is; short: what is refused without it.
- tests/adapters/test_packed.py: every family and source of expert ids, short: a window, a latent, sinks.
"""

import os

LONG = os.environ.get("PIKV_TEST_LONG") == "1"


def short_or_long(short: list, whole: list) -> list:
    """What this run checks: `whole`, or those of it that are in `short`, which must all be there."""
    unknown = [item for item in short if item not in whole]
    assert not unknown, f"not among what the long form checks: {unknown}"
    return whole if LONG else [item for item in whole if item in short]
