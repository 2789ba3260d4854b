"""Ranks that die, and messages that are lost, at every message of a move: all that are left have moved or none, and no entry is lost."""

import pytest

from pikv_ds.errors import PeerError
from tests.long_form import LONG

from .faults import at_message, phases_of, random_trial
from .moving import BLOCKS, Trial, contents, outcome
from .simulated import Killed

SWAPPED = ((1,), (0,), (1,), (0,), (0,), (1,), (0,), (1,))


def trial(**options) -> Trial:
    return Trial(**{"world": 2, "block": 0, "requests": "distinct", "ahead": None, "holders": SWAPPED, "seed": 3} | options)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
@pytest.mark.parametrize("requests", ["replicated", "distinct"])
def test_a_move_without_a_fault_moves_everything(requests, block):
    one = trial(requests=requests, block=block)
    network, before = one.prepared()
    assert one.move(network, None) == [None, None]
    assert outcome(one, [None, None], before) == "committed"
    now = {key: value for cache in one.caches.values() for key, value in contents(cache).items()}
    assert now == before


@pytest.mark.parametrize("how", ["before it sends", "after it has sent", "lost"])
def test_every_message_of_a_move(how):
    found = {}
    for message in range(len(phases_of(trial()))):
        one = trial()
        said = at_message(one, message, how)
        found.setdefault(said["phase"], set()).add(said["outcome"])
    assert set(found) == {"agreeing", "leaving", "vote"}, found
    assert found["agreeing"] == found["leaving"] == {"rolled back"}
    assert found["vote"] == ({"rolled back"} if how == "before it sends" else {"committed"}), found


def test_the_survivors_of_a_vote_that_only_some_heard_agree():
    """Four ranks; rank 0 dies once it has voted, and its vote reaches one of the others: the two in doubt follow that one."""
    holders = ((1,), (0,), (3,), (2,), (0,), (1,), (2,), (3,))
    vote = len(phases_of(trial(world=4, holders=holders))) - 1
    one = trial(world=4, holders=holders)
    said = at_message(one, vote, "after it has sent", rank=0, deaf=(1, 3))
    assert said["outcome"] == "committed" and said["in_doubt"] == 2


@pytest.mark.parametrize("seed", range(100 if LONG else 12))
def test_random_moves_with_a_fault(seed):
    said = random_trial(seed)
    assert said["outcome"] in ("committed", "rolled back"), said


def test_what_is_called_after_a_rank_died_says_so():
    one = trial()
    network, _ = one.prepared()
    from .simulated import Fault

    ended = one.move(network, Fault(message=2, rank=1))
    assert isinstance(ended[1], Killed) and isinstance(ended[0], PeerError)
    with pytest.raises(PeerError, match="cannot be used any more"):
        one.hosts[0].decode(1)
