"""A rank of a chat other than 0: does what rank 0 says, until it says stop or is gone."""

from __future__ import annotations

import os
import sys
import threading

import torch

from pikv_ds.launch.serving.control import Control
from pikv_ds.launch.serving.follow import end_with
from pikv_ds.launch.serving.start import join

from .spec import ChatSpec
from .talk import Talk


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    port, spec = int(sys.argv[1]), ChatSpec.from_json(sys.argv[2])
    torch.set_num_threads(spec.threads)
    join(port, spec)
    talk, control = Talk(spec), Control(spec.timeout_s)
    while (said := control.listen()) != "stop":
        if said == "forget":
            talk.forget()
        elif said == "stats":
            control.answer(talk.stats())
        elif isinstance(said, dict):
            control.answer(talk.keep(**said))
        elif isinstance(said, list):
            control.answer(talk.answer(said))
    talk.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
