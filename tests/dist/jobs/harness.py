"""lm-eval's models on several ranks, against what its own hf model gave. args: host, file of {style: [arguments, answers]}."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from lm_eval.api.registry import get_model

from pikv_ds.errors import UnsupportedError
from pikv_ds.launch.evaluation.lm_eval import register
from tests.dist.jobs.report import Report
from tests.launch.lm_eval_styles import STYLES, answers, assert_equal

host, expected = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
report = Report()
register()
for name, (args, theirs) in expected.items():
    style = STYLES[name]
    with report.check(name):
        try:
            lm = get_model(host)(**args)
        except UnsupportedError as error:
            assert str(style.batch).startswith("auto") and "would not agree on a size" in str(error), error
            continue
        try:
            assert_equal(answers(lm, style), theirs, 1e-3)
        except UnsupportedError as error:
            assert host == "pikv_megatron" and style.moves_rows, error
        finally:
            lm.cache_backend.close()
dist.barrier()
dist.destroy_process_group()
