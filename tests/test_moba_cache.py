"""`MoBACache` on its own: what it stores, sums and refuses. Decoding over it: test_moba_decode.py."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlab.moba_cache import MoBACache

KV_HEADS, DIM = 2, 8


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values `[2, count, KV_HEADS, DIM]`."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, KV_HEADS, DIM, generator=g), torch.randn(2, count, KV_HEADS, DIM, generator=g)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.sampled_from([1, 4, 7]))
def test_running_sums_are_means(cuts, block_size):
    k, _ = tokens(sum(cuts))
    cache = MoBACache(2, sum(cuts) + 9, KV_HEADS, DIM, block_size=block_size)
    for part in k.split(cuts, 1):
        cache.append(part, part)
    expected = [x.mean(1) for x in k.split(block_size, 1)] if sum(cuts) else []
    found = cache.centroids()
    for i in range(found.shape[1]):
        mean = expected[i] if i < len(expected) else torch.zeros_like(found[:, i])
        torch.testing.assert_close(found[:, i], mean, atol=1e-6, rtol=1e-5)


def state(cache: MoBACache) -> list[Any]:
    tensors = (cache.k_pages, cache.v_pages, cache.table, cache.sums, cache.device_lengths)
    return [*(x.clone() for x in tensors), cache.lengths, cache.free_pages]


@pytest.mark.parametrize(
    ("arguments", "more", "lengths", "message"),
    [
        ({}, 15, None, r"row 0 holds 6 tokens .* 15 more pass its capacity of 20"),
        ({}, 15, [14, 15], r"row 1 holds 6 tokens .* 15 more pass its capacity of 20"),
        ({"page_size": 4, "pages": 5}, 4, None, r"8 more tokens need 2 pages of 4, 1 of 5 are free"),
        ({"page_size": 4}, 15, None, r"row 0 holds 6 tokens"),
        ({"starts": [2, 3]}, 15, None, r"row 0 holds 4 tokens behind 2 of padding, 15 more pass its capacity of 20"),
    ],
)
def test_overflow_names_sizes_and_changes_nothing(arguments, more, lengths, message):
    k, v = tokens(40)
    cache = MoBACache(2, 20, KV_HEADS, DIM, block_size=4, **arguments)
    cache.append(k[:, :6], v[:, :6])
    before = state(cache)
    with pytest.raises(ValueError, match=message):
        cache.append(k[:, :more], v[:, :more], lengths)
    for one, other in zip(before, state(cache), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    held = cache.lengths
    cache.append(k[:, :1], v[:, :1])
    assert cache.lengths == tuple(n + 1 for n in held)


@pytest.mark.parametrize("page_size", [None, 3])
def test_claim_and_write_are_append(page_size):
    k, v = tokens(12)
    one, other = (MoBACache(2, 12, KV_HEADS, DIM, block_size=4, page_size=page_size) for _ in range(2))
    addresses = [x.data_ptr() for x in (other.k_pages, other.table, other.sums, other.device_lengths)]
    for t in range(12):
        one.append(k[:, t : t + 1], v[:, t : t + 1])
        other.claim()
        other.write(k[:, t : t + 1], v[:, t : t + 1])
    for a, b in zip(state(one), state(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert addresses == [x.data_ptr() for x in (other.k_pages, other.table, other.sums, other.device_lengths)]


@pytest.mark.parametrize("page_size", [None, 5])
def test_rows_of_other_lengths_take_the_same_chunk(page_size):
    k, v = tokens(12)
    cache = MoBACache(2, 12, KV_HEADS, DIM, block_size=4, page_size=page_size)
    cache.append(k[:, :5], v[:, :5], lengths=[5, 2])
    cache.append(k[:, 5:9], v[:, 5:9])
    for row, kept in enumerate((5, 2)):
        whole = torch.cat([k[row, :kept], k[row, 5:9]])
        assert torch.equal(cache.keys(row), whole)
        means = torch.stack([x.mean(0) for x in whole.split(4)])
        torch.testing.assert_close(cache.centroids()[row, : len(means)], means, atol=1e-6, rtol=1e-5)
    assert cache.lengths == (9, 6) == tuple(cache.device_lengths.tolist())


def test_a_padded_batch_skips_its_padding_again_after_a_reset():
    cache = MoBACache(2, 12, KV_HEADS, DIM, block_size=4, starts=[0, 5])
    for seed in range(2):
        k, v = tokens(12, seed)
        for at in range(0, 12, 3):
            cache.append(k[:, at : at + 3], v[:, at : at + 3])
        assert cache.lengths == (12, 7)
        for row, start in enumerate((0, 5)):
            assert torch.equal(cache.keys(row), k[row, start:]) and torch.equal(cache.values(row), v[row, start:])
        cache.reset()


def test_nothing_of_a_graph_is_kept():
    k, v = (x.requires_grad_() for x in tokens(6))
    cache = MoBACache(2, 6, KV_HEADS, DIM, block_size=4)
    cache.append(k[:, :5], v[:, :5])
    cache.append(k[:, 5:], v[:, 5:])
    assert not any(x.requires_grad for x in (cache.keys(0), cache.values(0), cache.sums))


def make(**changes: Any) -> MoBACache:
    return MoBACache(**({"batch": 2, "capacity": 8, "kv_heads": 2, "head_dim": 4, "block_size": 2} | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "MoBACache: capacity must be a positive int, got 0"),
        ({"batch": True}, ValueError, "MoBACache: batch must be a positive int, got True"),
        ({"block_size": 2.0}, ValueError, "MoBACache: block_size must be a positive int, got 2.0"),
        ({"page_size": -1}, ValueError, "MoBACache: page_size must be a positive int, got -1"),
        ({"pages": 3}, ValueError, "MoBACache: pages needs page_size, got pages=3"),
        ({"dtype": torch.int64}, TypeError, "MoBACache: dtype must be float16"),
        ({"starts": [0, 1.5]}, TypeError, r"starts must be a sequence of ints or an integer tensor .*, got \[0, 1.5\]"),
        ({"starts": 3}, TypeError, "starts must be a sequence of ints or an integer tensor of one dimension, got 3"),
        ({"starts": [0, 9]}, ValueError, r"starts must be 2 ints in 0..8, got \[0, 9\]"),
        ({"starts": [0, 1], "page_size": 2}, ValueError, "starts needs contiguous storage, got page_size=2"),
    ],
)
def test_bad_cache(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


ZEROS = torch.zeros(2, 3, 2, 4)
META = ZEROS.to("meta")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.append(ZEROS[:1], ZEROS[:1]), ValueError, r"k must have shape \[2, T, 2, 4\], got \[1, 3, 2, 4\]"),
        (lambda c: c.append(ZEROS, ZEROS[:, :2]), ValueError, "v must have k's shape"),
        (lambda c: c.append(ZEROS.half(), ZEROS), TypeError, "k must have the cache's dtype torch.float32"),
        (lambda c: c.append([1], ZEROS), TypeError, "k must be a Tensor, got list"),
        (
            lambda c: c.append(ZEROS, ZEROS, [1.7, 2]),
            TypeError,
            r"lengths must be a sequence of.*, got \[1.7, 2\]",
        ),
        (lambda c: c.append(ZEROS, ZEROS, ["a", 2]), TypeError, r"lengths must be a sequence of.*, got \['a', 2\]"),
        (lambda c: c.append(ZEROS, ZEROS, 3), TypeError, "append: lengths must be a sequence of ints .*, got 3"),
        (lambda c: c.append(ZEROS, ZEROS, [1]), ValueError, r"lengths must be 2 ints in 0..3, got \[1\]"),
        (lambda c: c.append(ZEROS, ZEROS, [1, 4]), ValueError, r"lengths must be 2 ints in 0..3, got \[1, 4\]"),
        (lambda c: c.append(ZEROS, ZEROS, [1, -1]), ValueError, r"lengths must be 2 ints in 0..3, got \[1, -1\]"),
        (lambda c: c.append(META, META), ValueError, "k must be on the cache's cpu, got meta"),
        (lambda c: c.write(ZEROS, ZEROS), ValueError, "k must hold one token per row, got 3"),
        (lambda c: c.claim(0), ValueError, "tokens must be a positive int, got 0"),
        (lambda c: c.reset([2]), ValueError, r"rows must be ints in 0..1, got \[2\]"),
    ],
)
def test_bad_calls(call, error, message):
    cache = make()
    cache.append(ZEROS[:, :2], ZEROS[:, :2])
    with pytest.raises(error, match=message):
        call(cache)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.append(ZEROS, ZEROS, [3, 1]), "MoBACache.append: lengths needs a cache without starts"),
        (lambda c: c.claim(), "MoBACache.claim: append the padded prompt of 3 tokens first"),
        (lambda c: c.reset([1]), r"MoBACache.reset: a cache with starts empties all rows at once, got \[1\]"),
    ],
)
def test_bad_calls_of_a_padded_cache(call, message):
    cache = make(starts=[0, 3])
    cache.append(ZEROS[:, :2], ZEROS[:, :2])
    with pytest.raises(ValueError, match=message):
        call(cache)
