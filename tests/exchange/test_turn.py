"""When a frame is due, what it says, and what two ranks' frames that differ raise. One process: a rank is a Turn of its own."""

import pytest

from pikv_ds.errors import PeerError
from pikv_ds.exchange.frame import PAYLOAD, TEXT, WORDS, Frame, Kind, check
from pikv_ds.exchange.group_state import GroupState
from pikv_ds.exchange.turn import Told, Turn, differing

SHAPE = (4, "f32")


class Rank:
    """A turn of a cache with three layers. `records` sends one record per layer, with the frame that is due before it."""

    def __init__(self, group: GroupState, layers: int = 3) -> None:
        self.state = ("distinct", [1], [9])
        self.turn = Turn(group, Told(layers, lambda: [("page_size", "4")], lambda: [1, 2, 3], lambda: self.state))

    def forward(self, *layers: int, ends: bool = True, shapes: dict | None = None) -> list[Kind | None]:
        self.turn.begin()
        said = []
        for layer in layers or range(3):
            self.turn.step(layer, (shapes or {}).get(layer, SHAPE))
            frame = self.turn.due(f"sharing layer {layer}")
            said.append(None if frame is None else frame.kind)
            if frame is not None:
                self.turn.answered([frame, frame])
            self.turn.stepped()
        if ends:
            self.turn.finish()
            self.turn.end()
        return said


OPEN, FORWARD = Kind.OPEN, Kind.FORWARD


def test_only_the_first_forward_of_steady_decoding_is_opened():
    rank = Rank(GroupState())
    assert rank.forward() == [OPEN, None, None]
    assert rank.forward() == rank.forward() == [None] * 3
    rank.turn.close()
    assert rank.forward() == [OPEN, None, None]


def test_caches_of_a_group_are_numbered_and_switch_by_a_frame():
    group = GroupState()
    one, two = Rank(group), Rank(group)
    assert one.forward() == two.forward() == [OPEN, None, None]
    assert (one.turn.cache, two.turn.cache, group.caches) == (1, 2, 2)
    assert two.forward() == [None] * 3
    assert one.forward() == [FORWARD, None, None]
    assert one.forward() == [None] * 3


def test_a_forward_inside_another_hands_the_turn_back():
    group = GroupState()
    one, two = Rank(group), Rank(group)
    one.forward(), two.forward()
    one.turn.begin()
    one.turn.step(0, SHAPE)
    one.turn.answered([one.turn.due("layer 0")] * 2)
    assert two.forward() == [FORWARD, None, None]
    one.turn.stepped()
    one.turn.step(1, SHAPE)
    assert one.turn.due("layer 1").place == 2


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"layers": (0,), "ends": False}, [FORWARD, None, None]),  # broke off
        ({"layers": (0, 1)}, [FORWARD, None, None]),  # left out the last layer
        ({"layers": ()}, [None] * 3),
    ],
)
def test_what_comes_after_a_forward(how, said):
    rank = Rank(GroupState())
    rank.forward()
    rank.forward(*how["layers"], ends=how.get("ends", True))
    assert rank.forward() == said
    assert rank.forward() == [None] * 3


def test_a_forward_that_broke_off_before_any_collective_has_told_nobody_anything():
    rank = Rank(GroupState())
    rank.forward()
    rank.turn.begin()
    assert rank.forward() == [None] * 3


def test_a_layer_left_midway_and_what_is_sent_at_the_end_of_a_short_forward():
    rank = Rank(GroupState())
    rank.forward()
    rank.turn.begin()
    rank.turn.step(0, SHAPE)
    assert rank.turn.due("layer 0") is None
    rank.turn.step(1, SHAPE)  # without stepped(): layer 0 has raised, and the host went on
    assert rank.turn.due("layer 1").kind is FORWARD
    rank.turn.close()
    rank.forward()
    rank.turn.begin()
    rank.turn.step(0, SHAPE)
    rank.turn.stepped()
    rank.turn.finish()
    assert rank.turn.due("what is sent at the end").kind is FORWARD


def test_layers_in_another_order_or_of_another_shape():
    rank = Rank(GroupState())
    assert rank.forward(shapes={2: (8, "f32")}) == [OPEN, None, FORWARD]  # the specification does not say so many query heads
    assert rank.forward(shapes={2: (8, "f32")}) == [None] * 3
    assert rank.forward(0, 2, 1) == [None, FORWARD, FORWARD]
    assert rank.forward(0, 2, 1) == [None] * 3
    assert rank.forward(0, 2, 1, shapes={0: (4, "bf16")}) == [FORWARD, None, None]


def test_a_frame_reads_back_as_it_was():
    what = "sharing layer 3, ä"
    frame = Frame(kind=FORWARD, what=what, cache=2, forward=7, place=3, value=1, facts=5, state=2**62, calls=9, payload=(-1, 2) + (0,) * 6)
    assert len(frame.words()) == WORDS
    assert Frame.of(frame.words(), 0) == frame
    long = Frame(kind=Kind.MEET, what="x" * 200, payload=(0,) * PAYLOAD)
    assert Frame.of(long.words(), 0).what == "x" * 8 * TEXT
    with pytest.raises(PeerError, match="rank 1 has sent something else"):
        Frame.of([0] * WORDS, 1)


OTHER = Frame(kind=FORWARD, what="sharing layer 0", cache=2, forward=5)


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (Frame(kind=Kind.LOCKSTEP, what="lockstep"), ["rank 0: lockstep, not active", "rank 1: forward 5 of cache 2"]),
        (Frame(kind=FORWARD, what="a", cache=1, forward=5), ["forward 5 of cache 1", "forward 5 of cache 2"]),
        (Frame(kind=FORWARD, what="a", cache=2, forward=4), ["forward 4 of cache 2", "forward 5 of cache 2"]),
        (Frame(kind=FORWARD, what="a", cache=2, forward=5, place=3), ["the layers that have run (3, 0)"]),
        (Frame(kind=FORWARD, what="a", cache=2, forward=5, value=1), ["after one that broke off", "(True, False)"]),
        (Frame(kind=FORWARD, what="a", cache=2, forward=5, state=8), ["the rows that their caches hold"]),
        (Frame(kind=FORWARD, what="a", cache=2, forward=5, calls=3), ["the number of collectives so far (3, 0)"]),
        (Frame(kind=Kind.MEET, what="counting"), ["rank 0: counting"]),
        (Frame(kind=OPEN, what="a"), ["rank 0: the first forward of a new cache"]),
        (Frame(kind=OPEN, what="a", cache=3), ["the first forward of cache 3 after its reset"]),
    ],
)
def test_frames_that_differ_name_every_rank(one, told):
    with pytest.raises(PeerError, match="not about to do the same") as raised:
        check([one, OTHER])
    assert all(words in str(raised.value) for words in told), raised.value


def test_frames_that_say_the_same_pass():
    check([OTHER, OTHER])
    check([Frame(kind=Kind.LOCKSTEP, what="lockstep", value=active) for active in (0, 1)])
    with pytest.raises(PeerError, match="rank 1: seven"):
        check([Frame(kind=Kind.MEET, what="six"), Frame(kind=Kind.MEET, what="seven")])


def test_differing_facts_are_named():
    assert differing([b'[["a", "1"], ["b", "2"]]', b'[["a", "1"], ["b", "3"], ["c", "4"]]']) == [
        "b = 2 on rank 0, 3 on rank 1",
        "c = not there on rank 0, 4 on rank 1",
    ]
