"""The leader's books: who starts, where, in which batch, and when there is room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlab.lamina.plan import SplitPlan
from attnlab.lamina.requests import Request, Requests, Room

HEAD = SplitPlan("head", 2)


def books(plan=HEAD, capacity=None, page_size=4, batches=2):
    return Requests(plan, [Room(page_size, capacity)] * plan.shards, batches)


def started(books, *prompts, new=1):
    """Submit prompts of these lengths and admit what fits: ids admitted."""
    for n in prompts:
        books.submit("f", list(range(n)), new)
    return [a.id for a in books.admit()]


def test_a_request_reserves_the_pages_of_all_tokens_but_its_last():
    held = books(capacity=16)
    assert started(held, 5, 5, new=4) == [0, 1]  # 8 tokens each, 2 pages of 4
    assert held.free == [0, 0]
    assert started(held, 1) == []
    held.remove("f", 0)
    assert held.ended() == [0]
    assert [a.id for a in held.admit()] == [2]
    assert held.free == [1, 1]


def test_the_queue_is_not_overtaken():
    held = books(capacity=16)
    assert started(held, 12, 8, 1) == [0]  # 2 needs one page and there is one, but 1 came first
    assert not held.fits_next()
    held.remove("f", 0)
    assert held.fits_next()
    assert [a.id for a in held.admit()] == [1, 2]


@pytest.mark.parametrize(
    ("plan", "tokens", "fits"),
    [
        (HEAD, 16, True),
        (HEAD, 17, False),
        (SplitPlan("head", 3, sizes=(0, 2, 2)), 16, True),
        (SplitPlan("request", 2), 16, True),
        (SplitPlan("request", 2), 17, False),
        (SplitPlan("sequence", 2, block=4), 32, True),
        (SplitPlan("sequence", 2, block=4), 33, False),
        (SplitPlan("sequence", 2, sizes=(1, 3), block=4), 24, True),  # turns 1 0 1 1
        (SplitPlan("sequence", 2, sizes=(1, 3), block=4), 25, False),
    ],
)
def test_what_can_never_fit_is_refused(plan, tokens, fits):
    held = books(plan, capacity=16)
    if fits:
        held.submit("f", [1], tokens)
        assert len(held.admit()) == 1
    else:
        with pytest.raises(ValueError, match=rf"f: .* got 1 \+ {tokens} tokens, of which {tokens} .* 4 pages of 4, 4"):
            held.submit("f", [1], tokens)
        assert held.snapshot() == ()


def test_a_request_plan_places_by_load_and_share():
    held = Requests(SplitPlan("request", 3, sizes=(1, 0, 2)), [Room(4, None)] * 3, 2)
    for _ in range(6):
        held.submit("f", [1, 2, 3], 2)
    shards = [a.shard for a in held.admit()]
    assert shards == [0, 2, 2, 0, 2, 2]
    assert held.reserved == [2, 0, 4]


def test_a_request_plan_takes_the_worker_that_has_room():
    held = Requests(SplitPlan("request", 2), [Room(4, 4), Room(4, 12)], 1)
    for n in (4, 4, 4, 4):
        held.submit("f", [1] * n, 1)
    assert [a.shard for a in held.admit()] == [0, 1, 1, 1]


def test_batches_are_balanced_when_requests_join_and_leave():
    held = books(batches=3)
    started(held, *[3] * 9)
    assert sorted(map(len, held.batches())) == [3, 3, 3]
    assert sorted(i for batch in held.batches() for i in batch) == list(range(9))
    for id in held.batches()[0]:
        held.remove("f", id)
    assert sorted(map(len, held.batches())) == [2, 2, 2]
    started(held, 3)
    assert sorted(map(len, held.batches())) == [2, 2, 3]


def test_of_equal_batches_the_one_with_fewer_tokens_is_joined():
    held = books()
    started(held, 100, 3, 3)
    assert held.batches() == [[0], [1, 2]]


@pytest.mark.parametrize(
    ("prompts", "left", "moved"),
    [((9, 1, 2, 1, 20, 1), 4, 3), ((20, 2, 9, 5, 9, 1), 1, 3)],
)
def test_the_request_moved_is_the_one_that_evens_out_tokens(prompts, left, moved):
    held = books()
    started(held, *prompts)
    assert held.batches() == [[0, 3, 5], [1, 2, 4]]
    for id in {1, 2, 4} - {left}:
        held.remove("f", id)
    assert held.batches() == [[0, 8 - moved], [left, moved]]


def test_a_request_ends_with_its_last_token_or_an_end_of_sequence():
    held = books()
    started(held, 2, 2, new=2)
    held.take(0, 7, ends=(9,))
    held.take(1, 9, ends=(9,))
    assert held.ended() == [1]
    assert held.snapshot() == (Request(0, (0, 1, 7), 2, 1),)
    assert held.snapshot()[0].generated == (7,)
    held.take(0, 7, ends=(9,))
    assert held.ended() == [0]
    assert held.snapshot() == ()
    assert held.batches() == [[], []]


def test_a_waiting_request_leaves_nothing_to_drop():
    held = books(capacity=4)
    assert started(held, 4, 4) == [0]
    held.remove("f", 1)
    assert held.ended() == []
    for id in (1, 5, None):
        with pytest.raises(ValueError, match=f"f: id must be of a request under way, got {id}"):
            held.remove("f", id)


@given(
    st.sampled_from([HEAD, SplitPlan("request", 3, sizes=(1, 0, 2)), SplitPlan("sequence", 3, block=4)]),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3)), max_size=25),
    st.integers(1, 4),
)
def test_books_balance_whatever_comes(plan, steps, batches):
    """No worker is ever over its capacity, every running request is in one batch, and all pages come back."""
    held = Requests(plan, [Room(4, 48)] * plan.shards, batches)
    for length, new, gone in steps:
        held.submit("f", [1] * length, new)
        held.admit()
        for id in held.running[:gone]:
            held.take(id, 1, ())
        listed = [i for batch in held.batches() for i in batch]
        assert sorted(listed) == sorted(held.running)
        assert max(map(len, held.batches())) - min(map(len, held.batches())) <= 1
        assert all(0 <= free <= 12 for free in held.free)
        assert [12 - free for free in held.free] == held.reserved
    while held.snapshot():
        held.admit()
        held.remove("f", held.running[0])
    assert held.free == [12] * plan.shards
