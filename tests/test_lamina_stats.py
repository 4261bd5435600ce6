"""What is made of the ranks' reports."""

import dataclasses

import pytest

from attnlab.lamina import DecoderStats


def report(sent=None, waited=None, busy=None, events=()):
    return {"sent": sent or {}, "waited": waited or {}, "busy": busy or {}, "events": [list(e) for e in events]}


LEADER = report(
    {"q": 100, "kv": 50, "command": 7},
    {"out": 2.0},
    {"slice": 9.0},
    [("slice", 0, 0, 1.0, 2.0), ("kv", 0, 0, 1.5, 2.0), ("slice", 0, 1, 4.0, 5.0), ("kv", 0, 1, 4.5, 5.0)],
)
WORKER = report(
    {"out": 100},
    {"q": 1.0},
    {"attend": 0.5, "append": 0.25},
    [("attend", 0, 0, 1.8, 2.3), ("append", 0, 0, 2.5, 3.0), ("attend", 1, 1, 4.5, 5.0)],
)


@pytest.fixture
def stats():
    return DecoderStats.of([LEADER, WORKER], models=1, tokens=12, decoded=10, seconds=4.0)


def test_counters_are_summed_over_ranks(stats):
    assert stats.bytes == {"q": 100, "kv": 50, "command": 7, "out": 100}
    assert stats.waited == {"out": 2.0}  # the model's ranks alone
    assert stats.attention_busy == (0.75,)
    assert stats.bytes_per_token == 25.0  # commands are not attention's, first tokens none of the rounds'


def test_communication_is_when_nobody_computes(stats):
    """1 to 2.3 and 2.5 to 3 and 4 to 5, of 1 to 5."""
    assert stats.communication == pytest.approx(1.2 / 4)


def test_overlap_counts_attention_of_the_same_slice_and_batch(stats):
    assert stats.overlap == 0.5


def test_since_takes_what_came_later(stats):
    more = report({"q": 160, "kv": 50}, {"out": 3.0, "token": 1.0}, {}, [*LEADER["events"], ("slice", 1, 0, 7.0, 8.0)])
    later = DecoderStats.of([more, WORKER], models=1, tokens=15, decoded=12, seconds=5.0).since(stats)
    assert (later.tokens, later.decoded, later.seconds) == (3, 2, 1.0)
    assert later.bytes["q"] == 60 and later.waited == {"out": 1.0, "token": 1.0}
    assert later.attention_busy == (0.0,)
    assert later.events == ((("slice", 1, 0, 7.0, 8.0),), ())
    assert later.communication == 0.0


def test_without_a_trace_there_are_no_shares(stats):
    bare = dataclasses.replace(stats, events=((), ()), decoded=0)
    assert bare.communication is None
    assert bare.overlap is None
    assert bare.bytes_per_token == 0.0
