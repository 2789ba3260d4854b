"""Run an unmodified Megatron-LM inference script with PiKV in place of the dense KV cache.

torchrun --nproc_per_node 2 -m pikv_ds.launch.megatron_run pikv.json tools/run_dynamic_text_generation_server.py --load DIR ...
"""

from __future__ import annotations

import os
import runpy
import sys

USAGE = "usage: torchrun -m pikv_ds.launch.megatron_run PIKV_JSON SCRIPT [arguments of the script]; PIKV_JSON: the 'pikv' block"


def main() -> None:
    arguments = sys.argv[1:]
    if len(arguments) < 2 or any(argument.startswith("-") for argument in arguments[:2]):
        raise SystemExit(f"{USAGE}\nno block and script in {arguments}")
    block, script = arguments[:2]
    for path in (block, script):
        if not os.path.isfile(path):
            raise SystemExit(f"{USAGE}\nno such file: {path}")
    from pikv_ds.launch.device import let_memory_grow
    from pikv_ds.megatron_patch import install

    let_memory_grow()
    install(block)
    sys.argv = arguments[1:]
    # As `python script.py` does: the script's folder comes first, not the current one.
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
