"""Where a launched process works: its own GPU, chosen before anything lands on one, and how its memory is asked for."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's own variables, the newer name first
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")  # torchrun's; DeepSpeed's; of launchers with neither, on one machine


def own_device() -> str:
    """ "cuda" with the GPU of this rank made the current one, or "cpu": without GPUs, with fewer than ranks, or by DS_ACCELERATOR.

    Called before a model is loaded. Without it every rank of a machine puts its copy on the first GPU.
    """
    import torch

    ranks = next((int(os.environ[name]) for name in _LOCAL_RANKS if name in os.environ), 1)
    if os.environ.get("DS_ACCELERATOR") == "cpu" or torch.cuda.device_count() < ranks:
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return "cuda"


def let_memory_grow(environment: MutableMapping[str, str] | None = None) -> None:
    """Ask torch's CUDA allocator for segments that can grow, unless the user has said something. Before the first CUDA tensor.

    A layer's pages grow by a few percent at a time. Each block is a little larger than any that was freed, so the ordinary allocator keeps
    all the old ones: up to 33 times the layer. Segments that grow map memory page by page and use it again.
    """
    environment = os.environ if environment is None else environment
    if not any(name in environment for name in ALLOCATOR):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # torch 2.11 to 2.13 read both names
