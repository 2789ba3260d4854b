"""Which pages the queries of a Driver were told to read."""

from torch import Tensor

from pikv_ds.cache.inspect import CacheProbe

Block = list[list[set[int]]]  # [query][kv head, or 0 for all] -> first positions of the pages read


def recorded_choices(probe: CacheProbe) -> list[Block]:
    """Filled while the cache runs, a block per choice: up to 32 queries of every row. Whoever reads it empties it."""
    found: list[Block] = []

    def look(asked, page_list: Tensor) -> None:
        columns = page_list.view(asked.first.shape[0], -1, *page_list.shape[1:])  # [Q, S, H, K]
        block = [[set() for _ in range(columns.shape[2])] for _ in columns]
        for query, shard, head, k in (columns >= 0).nonzero().tolist():
            block[query][head].add(int(asked.first[query, shard, columns[query, shard, head, k]]))
        found.append(block)

    probe.on_choice(look)
    return found


def by_row(blocks: list[Block], num_rows: int) -> list[Block]:
    """[row][query][kv head]: the queries of each row in their order."""
    rows: list[Block] = [[] for _ in range(num_rows)]
    for block in blocks:
        each = len(block) // num_rows
        for row, own in enumerate(rows):
            own += block[row * each : (row + 1) * each]
    return rows
