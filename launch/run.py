"""Run an unmodified DeepSpeed script with the "pikv" block honoured.

deepspeed --module pikv_ds.launch.run user_script.py --deepspeed_config ds_config.json
torchrun -m pikv_ds.launch.run user_script.py
"""

from __future__ import annotations

import os
import runpy
import sys

USAGE = "usage: deepspeed --module pikv_ds.launch.run user_script.py [arguments of the script]"


def split_arguments(argv: list[str]) -> tuple[str, list[str]]:
    """The script and its arguments. The launcher puts --local_rank first; the script expects it after its name."""
    ahead = []
    rest = list(argv)
    while rest and rest[0].startswith("--local"):
        ahead.append(rest.pop(0))
        if "=" not in ahead[-1] and rest:
            ahead.append(rest.pop(0))
    if not rest or rest[0].startswith("-"):
        raise SystemExit(f"{USAGE}\nno script in {argv}")
    return rest[0], ahead + rest[1:]


def main() -> None:
    script, arguments = split_arguments(sys.argv[1:])
    if not os.path.isfile(script):
        raise SystemExit(f"{USAGE}\nno such file: {script}")
    from pikv_ds.launch.device import let_memory_grow
    from pikv_ds.ops.build.torch_builds import announce_build, own_folder, watch_locks

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own_folder()))
    let_memory_grow()
    watch_locks()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        announce_build()
    # Before the script runs, so that its own `from deepspeed import ...` finds the functions that know the block.
    from pikv_ds.adapters.deepspeed.initialize import install
    from pikv_ds.adapters.deepspeed.shm import unlink_once_mapped

    install()
    unlink_once_mapped()  # a script without the block leaves nothing in /dev/shm either, however its ranks end
    sys.argv = [script, *arguments]
    # As `python script.py` does: the script's folder comes first, not the current one.
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
