"""What all ranks know about homes and loads, against loops over (row, position, shard)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.placement.directory import Directory
from tests.harness.driver import layer

WINDOWS = [None, 1, 2, 5]
LAYERS = [layer(i, window=window) for i, window in enumerate(WINDOWS)]


def loads(homes: list[list[int]], window: int | None, num_shards: int) -> list[int]:
    """homes[row][position] -> entries per shard that the next query of the row sees."""
    seen = [shard for row in homes for p, shard in enumerate(row) if window is None or p > len(row) - window]
    return [seen.count(shard) for shard in range(num_shards)]


def check(directory: Directory, homes: list[list[int]], num_shards: int) -> None:
    for i, window in enumerate(WINDOWS):
        assert directory.load[i].tolist() == loads(homes, window, num_shards), f"window {window}"
        for row, of_row in enumerate(homes):
            assert directory.shard_at[i][row, : len(of_row)].tolist() == of_row


@settings(max_examples=40)
@given(st.data())
def test_homes_and_loads_through_chunks_decode_forks_and_crops(data):
    num_shards, num_rows = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    directory = Directory(LAYERS, num_shards, torch.device("cpu"))
    directory.reset(num_rows)
    homes = [[] for _ in range(num_rows)]
    for _ in range(data.draw(st.integers(1, 5))):
        decode = data.draw(st.booleans())
        columns = 1 if decode else data.draw(st.integers(2, 7))
        new = [data.draw(st.lists(st.integers(0, num_shards - 1), max_size=columns)) for _ in homes]
        forward(directory, homes, new, columns)
        homes = [old + fresh for old, fresh in zip(homes, new, strict=True)]
        check(directory, homes, num_shards)
        if data.draw(st.booleans()):
            parents = data.draw(st.lists(st.integers(-1, len(homes) - 1), min_size=1, max_size=3))
            keep = [data.draw(st.integers(0, len(homes[p]))) if p >= 0 else 0 for p in parents]
            removed = directory.fork(torch.tensor(parents), torch.tensor(keep), torch.tensor([len(row) for row in homes]))
            cut = [homes[p][n:] if p >= 0 else [] for p, n in zip(parents, keep, strict=True)]
            for of_layer in removed:
                assert of_layer.tolist() == [[row.count(shard) for shard in range(num_shards)] for row in cut]
            homes = [homes[p][:n] if p >= 0 else [] for p, n in zip(parents, keep, strict=True)]
            check(directory, homes, num_shards)


def forward(directory: Directory, homes: list[list[int]], new: list[list[int]], columns: int) -> None:
    before = torch.tensor([len(row) for row in homes])
    after = before + torch.tensor([len(row) for row in new])
    directory.reserve(int(after.max()))
    rows = torch.arange(len(homes)).repeat_interleave(columns)
    shard = torch.tensor([row + [0] * (columns - len(row)) for row in new]).view(-1)
    positions = torch.tensor(
        [[len(old) + c if c < len(row) else -1 for c in range(columns)] for old, row in zip(homes, new, strict=True)]
    ).view(-1)
    for i in range(len(LAYERS)):
        directory.leave(i, rows, positions, positions >= 0, before, after, columns == 1)
        staying = [
            home
            for old, n in zip(homes, after.tolist(), strict=True)
            for p, home in enumerate(old)
            if WINDOWS[i] is None or p > n - WINDOWS[i]
        ]
        assert directory.load[i].tolist() == [staying.count(s) for s in range(directory.num_shards)], (
            "what leaves must be out before homes are chosen"
        )
        directory.record(i, rows, positions, positions >= 0, shard, after)


def sums(directory: Directory) -> int:
    """Bytes of 8 per shard, and per shard and row: loads and evicted entries, int64."""
    return 8 * directory.num_shards * len(directory.layers) * (1 + directory.evicted.shape[1])


def test_one_shard_stores_no_homes():
    directory = Directory(LAYERS, 1, torch.device("cpu"))
    directory.reset(3)
    directory.reserve(1000)
    assert directory.nbytes == sums(directory)
    removed = directory.fork(torch.tensor([1, -1]), torch.tensor([2, 0]), torch.tensor([5, 7, 9]))
    assert [of_layer.tolist() for of_layer in removed] == [[[5], [0]]] * len(LAYERS)


def test_the_table_costs_two_bytes_per_token_and_grows_by_half():
    directory = Directory(LAYERS[:1], 2, torch.device("cpu"))
    directory.reset(3)
    directory.reserve(100)
    width = directory.shard_at[0].shape[1]
    assert 101 <= width <= 160 and directory.nbytes == 3 * width * 2 + sums(directory)
    directory.reserve(width - 1)
    assert directory.shard_at[0].shape[1] == width, "the last column is spare, so width - 1 positions fit"
    directory.reserve(width)
    assert directory.shard_at[0].shape[1] > width
    directory.reset(2)
    assert directory.nbytes == sums(directory)
