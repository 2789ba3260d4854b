"""Tests of the real model run where it has been made, and are skipped elsewhere with the command that makes it."""

import pytest

from pikv_ds.launch.real_model import COMMAND, VARIABLE, find

needs_real = pytest.mark.skipif(find("dense") is None or find("moe") is None, reason=f"no real model: run `{COMMAND}` (or set {VARIABLE})")
