"""Which shard holds what: bounds, owners, counts and splits of a plan agree with each other."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.lamina import SplitPlan

SHARES = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any).map(tuple)


def plan_of(by, sizes, even, block=64):
    return SplitPlan(by, len(sizes), None if even else sizes, block)


def cache(batch, tokens, heads=2, dim=3):
    """Keys that say which row, token and head they are."""
    parts = (torch.arange(n) for n in (batch, tokens, heads))
    return torch.stack(torch.meshgrid(*parts, indexing="ij"), -1).float()


@settings(max_examples=50, deadline=None)
@given(SHARES, st.booleans(), st.integers(1, 9), st.integers(0, 400))
def test_owner_count_and_split_agree(sizes, even, block, length):
    plan = plan_of("sequence", sizes, even, block)
    owner = plan.owner(torch.arange(length))
    assert owner.dtype == torch.int64 and owner.shape == (length,)
    assert plan.count(length) == owner.bincount(minlength=plan.shards).tolist()
    k = cache(2, length)
    lengths = torch.tensor([length, length // 3], dtype=torch.int32)
    for shard, held in enumerate(plan.split(k, -k, lengths)):
        tokens = (owner == shard).nonzero().flatten()
        assert torch.equal(held.k, k[:, tokens]) and torch.equal(held.v, -k[:, tokens])
        assert held.lengths.dtype == torch.int32 and held.page_table is None
        assert held.lengths.tolist() == [plan.count(int(n))[shard] for n in lengths]
    assert all(x.lengths is None for x in plan.split(k, k))


@settings(max_examples=50, deadline=None)
@given(SHARES, st.integers(1, 5), st.integers(0, 2000))
def test_turns_follow_the_shares_at_every_length(sizes, block, length):
    plan = SplitPlan("sequence", len(sizes), sizes, block)
    total, blocks = sum(sizes), -(-length // block)
    for shard, (count, share) in enumerate(zip(plan.count(length), sizes, strict=True)):
        fair = blocks * share / total
        assert abs(count / block - fair) <= 1.5 + share / total * len(sizes) / 2, shard
        assert share or not count
    whole = plan.count(3 * total * block)
    assert whole == [3 * n * block for n in sizes]


def test_turns_by_hand():
    assert SplitPlan("sequence", 3, block=2).owner(torch.arange(9)).tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1]
    assert SplitPlan("sequence", 2, (1, 3), 1).owner(torch.arange(8)).tolist() == [1, 0, 1, 1, 1, 0, 1, 1]
    assert SplitPlan("sequence", 3, (4, 0, 2), 1).owner(torch.arange(3)).tolist() == [0, 2, 0]
    assert SplitPlan("sequence", 2, (1 << 40, 3 << 40), 1).count(8) == [2, 6]
    assert SplitPlan("sequence", 1).owner(torch.tensor([[0], [10**9]])).tolist() == [[0], [0]]


def test_a_token_stays_where_it_is_as_the_sequence_grows():
    plan = SplitPlan("sequence", 4, (3, 1, 0, 2), 5)
    for length, longer in pairwise(range(200)):
        grown = [b - a for a, b in zip(plan.count(length), plan.count(longer), strict=True)]
        assert grown == [int(plan.owner(torch.tensor(length)) == i) for i in range(4)]


@settings(max_examples=50, deadline=None)
@given(SHARES, st.booleans(), st.integers(0, 40))
def test_request_bounds_cover_all_in_order(sizes, even, requests):
    plan = plan_of("request", sizes, even)
    bounds = plan.request_bounds(requests)
    assert [b for _, b in bounds[:-1]] == [a for a, _ in bounds[1:]]
    assert (bounds[0][0], bounds[-1][1], len(bounds)) == (0, requests, plan.shards)
    widths = [b - a for a, b in bounds]
    if even:
        assert max(widths) - min(widths) <= 1
    for width, share in zip(widths, sizes, strict=True):
        assert even or abs(width - requests * share / sum(sizes)) < 1


@settings(max_examples=50, deadline=None)
@given(SHARES, st.integers(0, 5))
def test_head_bounds(sizes, more):
    bounds = SplitPlan("head", len(sizes), sizes).head_bounds(sum(sizes))
    assert [b - a for a, b in bounds] == list(sizes) and bounds[0][0] == 0
    even = SplitPlan("head", len(sizes)).head_bounds(len(sizes) + more)
    widths = Counter(b - a for a, b in even)
    assert max(widths) - min(widths) <= 1 and even[-1][1] == len(sizes) + more


def test_heads_and_requests_are_views():
    k, v = torch.randn(5, 7, 4, 2), torch.randn(5, 7, 4, 2)
    lengths = torch.tensor([7, 0, 3, 4, 5], dtype=torch.int32)
    heads = SplitPlan("head", 3, (1, 0, 3)).split(k, v, lengths)
    assert [x.k.shape[2] for x in heads] == [1, 0, 3]
    assert torch.equal(torch.cat([x.v for x in heads], 2), v) and all(x.lengths is lengths for x in heads)
    rows = SplitPlan("request", 2, (2, 1)).split(k, v, lengths)
    assert [x.lengths.tolist() for x in rows] == [[7, 0, 3], [4, 5]]
    assert torch.equal(torch.cat([x.k for x in rows]), k)
    for shard in (*heads, *rows):
        assert shard.k.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_keys_past_the_lengths_stay_behind_them():
    k = torch.randn(2, 10, 1, 2)
    k[1, 4:] = torch.nan
    for shard in SplitPlan("sequence", 3, block=2).split(k, k, torch.tensor([10, 4], dtype=torch.int32)):
        for row, n in zip(shard.k, shard.lengths.tolist(), strict=True):
            assert not row[:n].isnan().any()


def test_plans_are_values():
    plan = SplitPlan("head", 2, [1, 3])
    assert plan == SplitPlan("head", 2, (1, 3)) and hash(plan) == hash(SplitPlan("head", 2, (1, 3)))
    with pytest.raises(AttributeError):
        plan.shards = 3


SEQUENCE, HEAD = SplitPlan("sequence", 2), SplitPlan("head", 3)
K = torch.zeros(2, 4, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SplitPlan("token", 2), ValueError, "by must be one of 'head', 'request', 'sequence', got 'token'"),
        (lambda: SplitPlan("head", 0), ValueError, "shards must be a positive int, got 0"),
        (lambda: SplitPlan("head", 2.0), ValueError, "shards must be a positive int, got 2.0"),
        (lambda: SplitPlan("sequence", 2, block=0), ValueError, "block must be a positive int, got 0"),
        (lambda: SplitPlan("sequence", 2, (1,)), ValueError, r"sizes must be 2 non-negative ints.*got \(1,\)"),
        (lambda: SplitPlan("request", 2, (1, -1)), ValueError, r"sizes must be 2 non-negative ints.*got \(1, -1\)"),
        (lambda: SplitPlan("request", 2, (1, 0.5)), ValueError, r"sizes must be 2 non-negative ints.*got \(1, 0.5\)"),
        (lambda: SplitPlan("request", 2, (1, True)), ValueError, r"sizes must be 2 non-negative ints"),
        (lambda: SplitPlan("request", 2, 5), TypeError, "sizes must be a sequence of ints or None, got 5"),
        (lambda: SplitPlan("request", 2, (0, 0)), ValueError, r"sizes must not all be 0, got \(0, 0\)"),
        (lambda: SplitPlan("sequence", 2, (1, 1 << 16)), ValueError, "sizes must sum to at most 65536"),
        (lambda: HEAD.head_bounds(2), ValueError, "shards must be at most the 2 KV heads, got 3"),
        (lambda: HEAD.head_bounds(0), ValueError, "kv_heads must be a positive int, got 0"),
        (lambda: HEAD.split(K, K), ValueError, "shards must be at most the 2 KV heads, got 3"),
        (
            lambda: SplitPlan("head", 2, (1, 2)).head_bounds(4),
            ValueError,
            r"sizes must sum to the 4 KV heads, got \(1, 2\), which sum to 3",
        ),
        (lambda: SEQUENCE.head_bounds(2), ValueError, "head_bounds: needs a plan by 'head', this one is by 'sequence'"),
        (lambda: SEQUENCE.request_bounds(2), ValueError, "request_bounds: needs a plan by 'request'"),
        (lambda: HEAD.owner(torch.zeros(1).int()), ValueError, "owner: needs a plan by 'sequence'"),
        (lambda: HEAD.count(3), ValueError, "count: needs a plan by 'sequence'"),
        (lambda: SEQUENCE.count(-1), ValueError, "length must be a non-negative int, got -1"),
        (lambda: SEQUENCE.owner(3), TypeError, "positions must be an int32 or int64 Tensor, got int"),
        (lambda: SEQUENCE.owner(torch.tensor([3, -2])), ValueError, "positions must not be negative, got -2"),
        (lambda: SEQUENCE.split(K, K[:1]), ValueError, r"one shape \[B, T, Hkv, D\], got \[2, 4, 2, 3\] and \[1, 4"),
        (lambda: SEQUENCE.split(K, None), TypeError, "v must be a Tensor, got NoneType"),
        (lambda: SEQUENCE.split(K, K, torch.tensor([1, 2])), TypeError, "lengths must be an int32 Tensor, got torch.i"),
        (lambda: SEQUENCE.split(K, K, torch.tensor([1]).int()), ValueError, r"lengths must have shape \[2\]"),
        (lambda: SEQUENCE.split(K, K, torch.tensor([1, 5]).int()), ValueError, r"lengths must be in 0..4, got \[1, 5"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
