"""Loads that fail at every stage and leave every weight as it was, on every rank. Arguments: layout, folder of what two ranks saved."""

import contextlib
import inspect
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import common
from torch.distributed.checkpoint import FileSystemReader

from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import checkpoint, cpu_compat, enable_pikv
from pikv_ds.megatron_patch.checkpoint import load_checkpoint
from tests.dist.jobs.report import Report
from tests.megatron import megatron_lm
from tests.megatron.models import start
from tests.megatron.runs import refused

ITERATION = "iter_0000040"
checkpoint_read = checkpoint._read


class Unknown:
    """Of a class that torch does not load."""


def truncate(*files: Path) -> None:
    for file in files:
        file.write_bytes(file.read_bytes()[:60])


DAMAGE: dict[str, tuple[type[Exception], str, Callable[[Path], object]]] = {
    "tracker of nothing": (FileNotFoundError, "names iter_0000041", lambda at: (at / megatron_lm.TRACKER).write_text("41\n")),
    "tracker of nonsense": (FileNotFoundError, "holds 'soon'", lambda at: (at / megatron_lm.TRACKER).write_text("soon")),
    "no tracker": (FileNotFoundError, "give one of ['iter_0000040']", lambda at: (at / megatron_lm.TRACKER).unlink()),
    "older format": (
        UnsupportedError,
        "is of format 'zarr'",
        lambda at: (at / ITERATION / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}'),
    ),
    "no index": (UnsupportedError, "can't be read", lambda at: (at / ITERATION / ".metadata").unlink()),
    "no whole index": (UnsupportedError, "can't be read", lambda at: truncate(at / ITERATION / ".metadata")),
    "unknown class": (UnsupportedError, "add_safe_globals", lambda at: torch.save({"args": Unknown()}, at / ITERATION / "common.pt")),
    "no whole common file": (UnsupportedError, "can't be read", lambda at: (at / ITERATION / "common.pt").write_bytes(b"PK")),
    "no whole tensors of a rank": (UnsupportedError, "can't be read", lambda at: truncate(*(at / ITERATION).glob("__1_*"))),
    "no tensors of a rank": (UnsupportedError, "No such file", lambda at: [file.unlink() for file in (at / ITERATION).glob("__0_*")]),
}
"""What happens to the folder, or on one rank's disk -> what load_checkpoint says."""
if "weights_only=False" in inspect.getsource(common):  # 0.17.0 unpickles whatever lies there, and later releases do not
    del DAMAGE["unknown class"]

MODELS: dict[str, tuple[str, dict]] = {
    "missing names": ("missing there: decoder.layers.0.self_attention.linear_qkv.bias, decoder.layers.1.", {"add_qkv_bias": True}),
    "unexpected names": ("have no place in the model: decoder.layers.self_attention.k_layernorm.weight, decoder.", {"qk_layernorm": False}),
    "other experts": ("linear_fc1.weight has global shape (2, 8, 64, 64) in the checkpoint", {"num_moe_experts": 16}),
    "other layers": ("and (3, 8, 64, 64) in the model", {"num_layers": 3}),
    "other vocabulary": ("embedding.word_embeddings.weight has global shape (2048, 64)", {"vocabulary": 1024}),
}
"""Another model than the checkpoint's -> what load_checkpoint says."""


def untouched(model, load: Callable[[], object], kind: type[Exception], words: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items() if value is not None}
    refused(kind, words, load)
    after = model.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value.view(torch.uint8), after[name].view(torch.uint8))]
    assert not changed, changed


def lose_a_key(wanted: dict, weights: Path) -> dict:
    state = checkpoint_read(wanted, weights)
    del state["decoder.final_layernorm.weight"]
    return state


def on_rank_1(patch) -> contextlib.AbstractContextManager:
    return patch if dist.get_rank() == 1 else contextlib.nullcontext()


def main() -> None:
    report = Report()
    cpu_compat.install()
    start(*map(int, sys.argv[1].split(",")))
    saved, arguments = Path(sys.argv[2]), megatron_lm.arguments()
    model = enable_pikv(megatron_lm.build(arguments).eval())
    with report.check("damaged"):
        for name, (kind, words, damage) in DAMAGE.items():
            copy = saved.with_name(f"{saved.name} {name}")
            if dist.get_rank() == 0:
                shutil.copytree(saved, copy)
                damage(copy)
            dist.barrier()
            untouched(model, lambda copy=copy: load_checkpoint(model, copy), kind, words)
        untouched(model, lambda: load_checkpoint(model, saved / "nothing"), FileNotFoundError, "no folder")
    with report.check("of another model"):
        for words, changes in MODELS.values():
            vocabulary = changes.pop("vocabulary", arguments.padded_vocab_size)
            other = megatron_lm.build(megatron_lm.arguments(padded_vocab_size=vocabulary), **changes)
            untouched(other, lambda other=other: load_checkpoint(other, saved), UnsupportedError, words)
    with report.check("one rank fails"):
        says = "no disk" if dist.get_rank() == 1 else "rank 1"
        with on_rank_1(mock.patch.object(checkpoint, "find_weights", side_effect=OSError("no disk"))):
            untouched(model, lambda: load_checkpoint(model, saved), OSError if dist.get_rank() == 1 else UnsupportedError, says)
        with on_rank_1(mock.patch.object(FileSystemReader, "read_data", side_effect=OSError("no disk"))):
            untouched(model, lambda: load_checkpoint(model, saved), UnsupportedError, "no disk")
        with on_rank_1(mock.patch.object(checkpoint, "_read", lose_a_key)):
            untouched(model, lambda: load_checkpoint(model, saved), UnsupportedError, "decoder.final_layernorm.weight differ")
    with report.check("then it loads"):
        load_checkpoint(model, saved)
        alone = megatron_lm.build(arguments)
        megatron_lm.load(alone, saved / ITERATION)
        assert all(torch.equal(own, other) for own, other in zip(model.parameters(), alone.parameters(), strict=True))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
