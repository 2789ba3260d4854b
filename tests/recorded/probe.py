"""What a recorded run looks like from inside. The only file here that knows names of pikv_ds which may move or be rewritten.

When the inside changes, this file follows, and outcomes.json does not: what is asked here is a definition, not an attribute.
"""

import hashlib
import json

from pikv_ds.adapters.hf.anatomy import find_attentions
from pikv_ds.adapters.hf.fingerprint import key_norms
from pikv_ds.adapters.hf.model_spec import read_model_spec
from pikv_ds.adapters.hf.rotation import inv_freq_of
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import stats
from pikv_ds.ops.build import load


def kernel() -> str:
    """Which code serves the ops of CPU tensors: "torch", or "cpu " and its instruction set."""
    served = load.ensured("cpu")
    return f"{served} {load.cpu_instruction_set()}" if served == "cpu" else served


def core_of(host) -> PiKVCache:
    """host: a PiKVCache, or what attach and the Megatron contexts return."""
    return host if isinstance(host, PiKVCache) else host.core


def group_of(core: PiKVCache):
    """The process group of a cache, None = it is alone."""
    return core.exchange.group


def announce_crops(core: PiKVCache) -> None:
    """The last tokens may be taken back, as in assisted decoding."""
    core.hold_margin = 0


def end_crops(core: PiKVCache) -> None:
    core.hold_margin = None


def kept(core: PiKVCache) -> dict:
    """Which positions are stored. digest: of the sets; counts: [layer][pool][row][table], a table being a local shard (and head)."""
    probe = CacheProbe(core)  # a set has no order
    held = [[[list(map(sorted, tables)) for tables in pool.held] for pool in probe.pools(layer)] for layer in range(probe.num_layers)]
    counts = [[[[len(table) for table in row] for row in pool] for pool in pools] for pools in held]
    return {"digest": hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16], "counts": counts}


def numbers(host) -> dict:
    """What stats() reports of the core: integers, lists of integers, words; and the floats it counts entries with."""
    said = stats(host, 1, 1) if isinstance(host, PiKVCache) else host.stats()
    said = {name: value for name, value in said.items() if name not in ("ops_passed_over", "attention_kernel")}  # of this machine
    said = {
        name: value for name, value in said.items() if name not in ("kv_bytes_parked", "rows_parked", "entries_loaded")
    }  # nothing here parks or loads
    return {name: value for name, value in said.items() if name not in ("probe_s", "state_bytes")}  # the adapter's own


def bytes_after_reset(core: PiKVCache) -> int:
    """All ranks of the group at the same point; the cache is empty afterwards."""
    core.reset()
    return stats(core, 1, 1)["kv_bytes_allocated"]


def layers_of(model) -> list:
    """LayerSpec of every layer of a transformers model."""
    return read_model_spec(model.config)


def calibration_facts(model) -> tuple[list, list]:
    """Of every layer of a transformers model: norms of the key projection [H, D], rotary frequencies [D / 2]."""
    specs = layers_of(model)
    norms = [key_norms(attention, spec.num_kv_heads) for attention, spec in zip(find_attentions(model), specs, strict=True)]
    return norms, [inv_freq_of(model.config, spec) for spec in specs]
