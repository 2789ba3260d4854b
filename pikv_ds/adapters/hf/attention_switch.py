"""Which attention function a model calls, set before each forward through a cache and set back after it."""

from __future__ import annotations

from copy import copy
from typing import Any

from transformers import PreTrainedConfig


class AttentionSwitch:
    """Of a decoder's configuration.

    transformers' own setter looks at attribute maps, per-layer values and sub-configurations: 7 us, twice in every forward. Where all that
    it changes is one entry of the configuration, that entry is written; which one is found out by setting it once.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self._values: dict[str, Any] = object.__getattribute__(config, "__dict__")
        self._entry = None if config.sub_configs else self._found()

    def _found(self) -> str | None:
        """The entry that the setter writes, if it writes just one, which the getter reads. Tried with a copy: others may use it now."""
        tried = copy(self.config)
        before, values = dict(self._values), object.__getattribute__(tried, "__dict__")
        tried._attn_implementation = "pikv"
        changed = [name for name in {**before, **values} if values.get(name) is not before.get(name)]
        return changed[0] if len(changed) == 1 and before.get(changed[0]) is self.config._attn_implementation else None

    @property
    def name(self) -> str | None:
        return self.config._attn_implementation if self._entry is None else self._values[self._entry]

    @name.setter
    def name(self, name: str | None) -> None:
        if self._entry is None:
            self.config._attn_implementation = name
        else:
            self._values[self._entry] = name
