"""The command that runs the matrix: which points it takes, and what it does when some fail."""

import pytest

from tests.ops import run_matrix
from tests.ops.matrix import Point, points, tensor_points


def test_shards_are_the_whole_and_share_nothing():
    whole = [point.id + point.op for point in (*points(True), *tensor_points(True))]
    parts = [[point.id + point.op for point in run_matrix.chosen(True, shard=(i, 7))] for i in range(1, 8)]
    assert sorted(sum(parts, [])) == sorted(whole) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_few_points_are_of_every_kind():
    few = run_matrix.chosen(False, count=60)
    assert len(few) == 60 and len({point.op for point in few}) >= 8
    assert {point.op for point in run_matrix.chosen(False, op="merge")} == {"merge"}
    assert len(run_matrix.chosen(False, op="merge", count=10**6)) == len([point for point in points() if point.op == "merge"])


def _points():
    def wrong(op, device):
        raise AssertionError("out is 1.0 away\nmore")

    return [
        Point("merge", "good", lambda op, device: 1e-7),
        Point("merge", "bad", wrong),
        Point("merge", "also good", lambda op, device: 2e-7),
    ]


def test_it_keeps_going_when_asked(monkeypatch, capsys):
    monkeypatch.setattr(run_matrix, "chosen", lambda *args: _points())
    with pytest.raises(AssertionError, match="1.0 away"):
        run_matrix.main(["torch"])
    assert run_matrix.main(["torch", "--keep-going"]) == 1
    said = capsys.readouterr().out
    assert "failed: bad: out is 1.0 away" in said and "3 points, 1 failed, largest error 2e-07" in said


@pytest.mark.parametrize("given", ["0/3", "4/3", "1", "a/b", "1/"])
def test_shards_that_are_not(given, capsys):
    with pytest.raises(SystemExit):
        run_matrix.main(["torch", "--shard", given])
    assert "I/N with 1 <= I <= N" in capsys.readouterr().err
