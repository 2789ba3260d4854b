"""Arguments of the no-edit launcher, as DeepSpeed's launcher passes them."""

import pytest

from pikv_ds.launch.run import split_arguments


@pytest.mark.parametrize(
    "argv, script, arguments",
    [
        (["--local_rank=1", "train.py", "--x", "2"], "train.py", ["--local_rank=1", "--x", "2"]),
        (["--local-rank", "1", "train.py"], "train.py", ["--local-rank", "1"]),
        (["train.py", "--local_rank=0"], "train.py", ["--local_rank=0"]),
    ],
)
def test_local_rank_moves_behind_the_script(argv, script, arguments):
    assert split_arguments(argv) == (script, arguments)


@pytest.mark.parametrize("argv", [[], ["--local_rank=0"], ["--module", "x"]])
def test_missing_script_prints_usage(argv):
    with pytest.raises(SystemExit, match="usage: deepspeed --module pikv_ds.launch.run"):
        split_arguments(argv)
