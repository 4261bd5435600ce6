"""Generation over a `WaveCache` whose layers read through a `WaveBuffer` each."""

import copy

import pytest
import torch

from attnlab import WaveConfig, WaveStats

pytest.importorskip("transformers")

from attnlab.hf import WaveCache
from tests.hf_models import build, generate, inputs, positions_of

WAVE = WaveConfig(
    sink=2, local=4, segment=32, tokens_per_cluster=4, iterations=3, update_every=8, retrieval_ratio=0.2,
    estimation_ratio=0.3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    model = build()
    model.set_attn_implementation("attnlab_wave")
    return model.double()


def cache_of(model, *budget, **options):
    names = dict(zip(("device_budget", "policy"), budget, strict=False))
    return WaveCache(model.config, WAVE, max_length=96, **names, **options)


def assert_same(found, expected):
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("padding", "policy"), [("none", "lru"), ("left", "clock")])
def test_a_buffer_changes_no_token(model, padding, policy):
    """Over five updates of the index, in caches too small for all."""
    ids, mask = inputs(padding)
    cache = cache_of(model, 0.5, policy, full_layers="last:1")
    assert cache.stats() == WaveStats(0, 0, 0, 0, 0, 0, 0, 0)
    expected = generate(model, ids, mask, cache_of(model, full_layers="last:1"), max_new_tokens=48)
    assert_same(generate(model, ids, mask, cache, max_new_tokens=48), expected)
    stats, buffers = cache.stats(), [layer.buffer for layer in cache.layers[:-1]]
    each = [buffer.stats() for buffer in buffers]
    for name in ("hits", "misses", "evictions", "bytes", "steps", "cache_bytes"):
        assert getattr(stats, name) == sum(getattr(x, name) for x in each) > 0
    assert stats.steps == 47 * len(buffers) and stats.hits > stats.misses
    assert (stats.capacity_pages, stats.page) == (buffers[0].capacity, 8) and stats.capacity_pages == each[
        1
    ].capacity_pages
    assert {buffer.policy for buffer in buffers} == {policy}


def test_chunks_between_steps_read_the_index(model):
    ids, mask = inputs("left")
    caches = cache_of(model), cache_of(model, 0.5)
    first, second = (generate(model, ids, mask, cache, prefill_chunk_size=9) for cache in caches)
    assert_same(first, second)


def test_reset_and_reuse_is_a_fresh_cache(model):
    ids, mask = inputs("left")
    cache = cache_of(model, 0.5)
    first, stats = generate(model, ids, mask, cache), cache.stats()
    places = [layer.buffer.cache.k.data_ptr() for layer in cache.layers]
    cache.reset()
    empty = cache.stats()
    assert (empty.hits, empty.misses, empty.evictions, empty.bytes, empty.steps) == (0, 0, 0, 0, 0)
    assert_same(generate(model, ids, mask, cache), first)
    assert cache.stats() == stats and [layer.buffer.cache.k.data_ptr() for layer in cache.layers] == places
    cache.reset()
    one = generate(model, ids[:1], mask[:1], cache)  # other rows: another index, and another buffer of it
    assert_same(one, generate(model, ids[:1], mask[:1], cache_of(model)))
    assert all(layer.buffer.index is layer.index for layer in cache.layers)


def test_a_copied_prefix_has_buffers_of_its_own(model):
    ids, mask = inputs("left")
    prefix = cache_of(model, 0.5)
    model(ids[:, :20], attention_mask=mask[:, :20], position_ids=positions_of(mask)[:, :20], past_key_values=prefix)
    twin = copy.deepcopy(prefix)
    first = generate(model, ids, mask, prefix)
    assert prefix.stats().steps > twin.stats().steps == 0
    assert_same(generate(model, ids, mask, twin), first)
    twin.reset()
    assert prefix.stats().steps > twin.stats().steps == 0


def test_too_small_a_buffer_says_so(model):
    ids, mask = inputs()
    with pytest.raises(
        ValueError, match=r"wave_attention: row \d, KV head \d asks for \d pages .* larger device_budget"
    ):
        generate(model, ids, mask, cache_of(model, 1e-9), max_new_tokens=30)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(device_budget=0), ValueError, r"device_budget must be in \(0, 1\], got 0"),
        (dict(device_budget=1.5), ValueError, r"device_budget must be in \(0, 1\], got 1.5"),
        (dict(device_budget="5%"), TypeError, r"device_budget must be a number in \(0, 1\], got '5%'"),
        (dict(device_budget=0.1, policy="fifo"), ValueError, "policy must be one of 'clock', 'lru', got 'fifo'"),
        (dict(policy=None), ValueError, "policy must be one of 'clock', 'lru', got None"),
    ],
)
def test_bad_buffers(model, change, error, message):
    with pytest.raises(error, match=f"WaveCache: {message}"):
        cache_of(model, **change)
    with pytest.raises(ValueError, match=r"WaveCache.stats: there are no buffers: device_budget must be in \(0, 1\]"):
        cache_of(model).stats()
