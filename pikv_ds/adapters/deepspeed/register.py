"""What DeepSpeed knows of PiKV by name: PiKVOpBuilder, and the "pikv" module of its inference v2."""

from __future__ import annotations

from deepspeed.inference.v2.modules.interfaces import DSSelfAttentionRegistry

from pikv_ds import ops

from .self_attention import PiKVSelfAttention


def register() -> None:
    """Enter both into DeepSpeed's tables. Calling it again does nothing."""
    ops.register()
    DSSelfAttentionRegistry.register_module(PiKVSelfAttention)


def unregister() -> None:
    """Take both out again; nothing happens if they are not there."""
    ops.unregister()
    DSSelfAttentionRegistry.registry.pop(PiKVSelfAttention.name(), None)
