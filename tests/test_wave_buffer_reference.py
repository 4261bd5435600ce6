"""The cache policy by hand, and against a second way to write it: whole sets at once, as a GPU would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlab.reference.wave_buffer import PolicyModel, cluster_pages

POLICIES = ("clock", "lru")


def ask(*pages: int) -> dict[int, int]:
    return dict.fromkeys(pages, 8)


def counters(model: PolicyModel) -> tuple[int, int, int, int]:
    return model.hits, model.misses, model.evictions, model.bytes


def test_pages_of_clusters():
    assert cluster_pages(0, 0, 20) == {0: 8, 1: 8, 2: 4}
    assert cluster_pages(1, 20, 0) == {}
    assert cluster_pages(2, 20, 1) == {4: 1}
    assert cluster_pages(1, 3, 5, page=2) == {2: 2, 3: 2, 4: 1}


@given(sizes=st.lists(st.integers(0, 40), max_size=30), page=st.integers(1, 9))
def test_page_ids_are_unique_rising_and_bounded(sizes, page):
    offset, seen = 0, []
    for cluster, size in enumerate(sizes):
        pages = cluster_pages(cluster, offset, size, page)
        assert sum(pages.values()) == size and all(0 < x <= page for x in pages.values())
        seen += pages
        offset += size
    assert seen == sorted(set(seen))
    assert not seen or seen[-1] < offset // page + len(sizes)


def test_clock_by_hand():
    model = PolicyModel(3, "clock", vector_bytes=10)
    assert model.step({5: 8, 2: 3}) == {2: 0, 5: 1}  # by rising id
    assert (model.hand, counters(model)) == (2, (0, 2, 0, 110))
    assert model.step(ask(7)) == {7: 2}
    assert (model.pages, model.used, model.hand) == ([2, 5, 7], [1, 1, 1], 0)
    # Place 0 is pinned and keeps its bit; 1 and 2 lose theirs on the way round, then 1 goes.
    assert model.step(ask(2, 9)) == {2: 0, 9: 1}
    assert (model.pages, model.used, model.hand) == ([2, 9, 7], [1, 1, 0], 2)
    # 2's bit is clear: the hand takes it at once.
    assert model.step(ask(1)) == {1: 2}
    assert (model.pages, model.used, model.hand) == ([2, 9, 1], [1, 1, 1], 0)
    assert counters(model) == (1, 5, 2, 110 + 3 * 80)


def test_lru_by_hand():
    model = PolicyModel(3, "lru", vector_bytes=10)
    assert model.step(ask(5, 2)) == {2: 0, 5: 1}
    assert model.step(ask(7)) == {7: 2}
    assert model.step(ask(2)) == {2: 0}
    assert model.used == [3, 1, 2]
    # The two oldest places are 1 and 2, filled from the lowest up.
    assert model.step(ask(9, 4)) == {4: 1, 9: 2}
    assert (model.pages, model.used) == ([2, 4, 9], [3, 4, 4])
    # 4 and 9 are equally old, 2 is older.
    assert model.step(ask(1, 3)) == {1: 0, 3: 1}
    assert counters(model) == (1, 7, 4, 7 * 80)


@pytest.mark.parametrize("policy", POLICIES)
def test_capacity_of_one(policy):
    model = PolicyModel(1, policy)
    for page in (4, 4, 6, 4):
        assert model.step(ask(page)) == {page: 0}
    assert counters(model) == (1, 3, 2, 24)


@pytest.mark.parametrize("policy", POLICIES)
def test_everything_fits(policy):
    model = PolicyModel(6, policy)
    for _ in range(3):
        model.step(ask(0, 1, 2))
        model.step(ask(3, 4, 5))
    assert counters(model) == (12, 6, 0, 48)


@pytest.mark.parametrize("policy", POLICIES)
def test_more_than_the_capacity_is_an_error_and_nothing_is_lost(policy):
    model = PolicyModel(3, policy)
    model.step(ask(1, 2))
    before = dict(vars(model), pages=list(model.pages), used=list(model.used))
    with pytest.raises(ValueError, match="asks for 4 pages, the cache holds 3"):
        model.step(ask(1, 2, 3, 4))
    assert vars(model) == before
    assert model.step(ask(1, 2, 3)) == {1: 0, 2: 1, 3: 2}


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_step_changes_no_contents(policy):
    model = PolicyModel(2, policy)
    model.step(ask(1, 2))
    assert model.step({}) == {} and model.pages == [1, 2] and counters(model)[:3] == (0, 2, 0)


class AtOnce:
    """The same policy without a walk: victims are ranked, then taken together."""

    def __init__(self, capacity: int, policy: str) -> None:
        self.capacity, self.policy, self.time, self.hand = capacity, policy, 0, 0
        self.pages: list[int | None] = [None] * capacity
        self.used, self.evictions = [0] * capacity, 0

    def step(self, request: dict[int, int]) -> None:
        self.time += 1
        pinned = [page in request for page in self.pages]
        missing = [page for page in sorted(request) if page not in self.pages]
        ring = [(self.hand + i) % self.capacity for i in range(self.capacity)]
        free = [place for place in ring if not pinned[place]]
        if self.policy == "lru":
            victims = sorted(sorted(free, key=lambda x: (self.used[x], x))[: len(missing)])
            mark = self.time
        else:
            first = [x for x in free if not self.used[x]]
            second = [x for x in free if self.used[x]]
            victims, mark = (first + second)[: len(missing)], 1
            if victims:
                passed = (
                    second
                    if len(missing) > len(first)
                    else second[: sum(ring.index(x) < ring.index(victims[-1]) for x in second)]
                )
                for place in passed:
                    self.used[place] = 0
                self.hand = (victims[-1] + 1) % self.capacity
        for place in range(self.capacity):
            if pinned[place]:
                self.used[place] = mark
        for page, place in zip(missing, victims, strict=True):
            self.evictions += self.pages[place] is not None
            self.pages[place], self.used[place] = page, mark


@given(
    capacity=st.integers(1, 8),
    policy=st.sampled_from(POLICIES),
    trace=st.lists(st.sets(st.integers(0, 14), max_size=8), max_size=60),
)
def test_equals_the_policy_taken_at_once(capacity, policy, trace):
    model, other, hits = PolicyModel(capacity, policy), AtOnce(capacity, policy), 0
    for pages in trace:
        request = ask(*sorted(pages)[:capacity])
        hits += sum(page in model.pages for page in request)
        places = model.step(request)
        other.step(request)
        assert {model.pages[place]: place for place in places.values()} == places and places.keys() == request.keys()
        assert (model.pages, model.used, model.hand) == (other.pages, other.used, other.hand)
    assert (model.hits, model.evictions) == (hits, other.evictions)
