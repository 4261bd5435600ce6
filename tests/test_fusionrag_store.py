"""Chunks by content: keys, tiers in memory, budgets, counters and what comes back."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import pytest
import torch

from attnlab.fusionrag import ChunkKey, ChunkKV, ChunkStore, TierStats
from attnlab.rope import DynamicScaling, LinearScaling, RopeConfig, YarnScaling

ROPE = RopeConfig(10000.0, 8)
BYTES = 2 * 2 * 5 * 3 * 8 * 4  # of a `chunk()`


def chunk(i=0, tokens=5, dtype=torch.float32, neighbours=(), seed=None, **changes):
    """A chunk whose ids and numbers depend on `i`; the numbers on `seed` where it is given."""
    key = ChunkKey.of([i, *range(tokens - 1)], **{"model": "m", "rope": ROPE, "system": [7, 8], **changes})
    generator = torch.Generator().manual_seed(i if seed is None else seed)
    k, v = torch.randn(2, 2, tokens, 3, 8, generator=generator).to(dtype)
    return ChunkKV(key, k, v, neighbours)


def same(found, expected):
    assert found.key == expected.key and found.neighbours == expected.neighbours
    assert found.k.dtype == expected.k.dtype
    assert torch.equal(found.k, expected.k) and torch.equal(found.v, expected.v)


def held(store, chunks):
    """Which of `chunks` the store's memory holds, without a lookup."""
    return [any(c.key.digest in tier.chunks for tier in store._memory.values()) for c in chunks]


def test_a_key_is_all_that_keys_and_values_depend_on():
    ids = [3, 1, 4, 1]
    key = ChunkKey.of(ids, model="m", rope=ROPE, system=[7])
    assert (key.tokens, key.base, key.model, key.rope) == (4, 1, "m", ROPE)
    for equal in (
        ChunkKey.of(torch.tensor(ids, dtype=torch.int32), model="m", rope=ROPE, system=torch.tensor([7])),
        ChunkKey.of(tuple(ids), model="m", rope=RopeConfig(10000, 8, rotary_dim=8), system=(7,)),
    ):
        assert equal == key and hash(equal) == hash(key) and equal.digest == key.digest
    other = [
        ChunkKey.of([3, 1, 1, 4], model="m", rope=ROPE, system=[7]),
        ChunkKey.of(ids[:3], model="m", rope=ROPE, system=[7]),
        ChunkKey.of(ids, model="n", rope=ROPE, system=[7]),
        ChunkKey.of(ids, model="m", rope=ROPE),
        ChunkKey.of(ids, model="m", rope=ROPE, system=[8]),
        ChunkKey.of([7, *ids], model="m", rope=ROPE),
        *(
            ChunkKey.of(ids, model="m", rope=rope, system=[7])
            for rope in (
                RopeConfig(10001.0, 8),
                RopeConfig(10000.0, 16),
                RopeConfig(10000.0, 8, rotary_dim=4),
                RopeConfig(10000.0, 8, interleaved=True),
                RopeConfig(10000.0, 8, scaling=LinearScaling(2.0)),
                RopeConfig(10000.0, 8, scaling=LinearScaling(4.0)),
                RopeConfig(10000.0, 8, scaling=DynamicScaling(2.0, 64)),
                RopeConfig(10000.0, 8, scaling=YarnScaling(2.0, 64)),
            )
        ),
    ]
    assert len({key, *other}) == len({k.digest for k in (key, *other)}) == 1 + len(other)
    assert key != "x" and len(key.digest) == 64 and set(key.digest) <= set("0123456789abcdef")
    with pytest.raises(FrozenInstanceError):
        key.model = "n"


def test_digests_do_not_change_between_processes_and_versions():
    assert chunk(3).key.digest == "965640997e9373e3667b458d16a1f4485a5ca8f175281ab8292024ed0874c169"


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ChunkKey.of([], model="m", rope=ROPE), ValueError, "tokens must hold at least one id"),
        (lambda: ChunkKey.of([1, -2], model="m", rope=ROPE), ValueError, "tokens must hold ids of at least 0, got -2"),
        (lambda: ChunkKey.of([1], model="m", rope=ROPE, system=[-3]), ValueError, "system must hold ids of at least 0"),
        (lambda: ChunkKey.of([1.5], model="m", rope=ROPE), TypeError, "tokens must be a sequence of ints"),
        (lambda: ChunkKey.of(torch.ones(1, 2).long(), model="m", rope=ROPE), TypeError, "tokens must be a sequence"),
        (lambda: ChunkKey.of([1], model="", rope=ROPE), ValueError, "model must be what fingerprint"),
        (lambda: ChunkKey.of([1], model=3, rope=ROPE), ValueError, "model must be what fingerprint"),
        (lambda: ChunkKey.of([1], model="m", rope={}), TypeError, "rope must be a RopeConfig, got dict"),
    ],
)
def test_bad_keys(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda c: {"key": "x"}, TypeError, "key must be a ChunkKey, got str"),
        (lambda c: {"k": [1]}, TypeError, "k must be a floating-point Tensor, got list"),
        (lambda c: {"v": c.v.int()}, TypeError, "v must be a floating-point Tensor, got torch.int32"),
        (lambda c: {"k": c.k[0]}, ValueError, r"k must have shape \[layers, 5, Hkv, 8\], got \[5, 3, 8\]"),
        (lambda c: {"k": c.k[:, :4]}, ValueError, r"k must have shape .* got \[2, 4, 3, 8\]"),
        (lambda c: {"k": c.k[..., :4]}, ValueError, r"k must have shape .* got \[2, 5, 3, 4\]"),
        (lambda c: {"k": c.k[:0]}, ValueError, r"k must have shape .* got \[0, 5, 3, 8\]"),
        (lambda c: {"v": c.v[:, :, :1]}, ValueError, "v must have k's shape"),
        (lambda c: {"v": c.v.half()}, ValueError, "v must have k's dtype torch.float32, got torch.float16"),
        (lambda c: {"v": c.v.to("meta")}, ValueError, "v must have k's device cpu, got meta"),
        (lambda c: {"neighbours": "a" * 64}, TypeError, "neighbours must be a tuple of digests"),
        (lambda c: {"neighbours": (c.key,)}, TypeError, "neighbours must be a tuple of digests"),
    ],
)
def test_bad_chunks(change, error, message):
    one = chunk()
    with pytest.raises(error, match=message):
        ChunkKV(**{"key": one.key, "k": one.k, "v": one.v, "neighbours": (), **change(one)})


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"ram_bytes": -1}, ValueError, "ram_bytes must be a non-negative int, got -1"),
        ({"ram_bytes": 1e9}, ValueError, "ram_bytes must be a non-negative int"),
        ({"pinned_bytes": -1}, ValueError, "pinned_bytes must be a non-negative int"),
        ({"path": "x", "disk_bytes": -1}, ValueError, "disk_bytes must be a non-negative int"),
        ({"disk_bytes": 9}, ValueError, "disk_bytes=9 needs a path, got None"),
        ({"ram_bytes": 0}, ValueError, "ram_bytes must be a positive int where there is no other tier, got 0"),
        ({"verify": 1}, TypeError, "verify must be a bool, got 1"),
    ],
)
def test_bad_options(options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        ChunkStore(**options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_key_and_no_chunk_is_refused():
    store, one = ChunkStore(), chunk()
    with pytest.raises(TypeError, match=r"ChunkStore.put: expected a ChunkKV, got tuple"):
        store.put((one.k, one.v))
    for call in (store.get, store.remove, store.__contains__, lambda key: store.get_many([one.key, key])):
        with pytest.raises(TypeError, match="expected a ChunkKey, got str"):
            call(one.key.digest)


def test_pinned_memory_needs_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="pinned_bytes must be 0 without CUDA, got 7"):
        ChunkStore(pinned_bytes=7)


def test_the_store_keeps_a_copy_of_its_own():
    wide = torch.randn(2, 2, 9, 3, 8)
    key, (k, v) = chunk().key, wide[:, :, 2:7].requires_grad_()
    store, expected = ChunkStore(), wide[:, :, 2:7].clone()
    store.put(ChunkKV(key, k, v))
    wide.zero_()
    found = store.get(key)
    assert torch.equal(found.k, expected[0]) and torch.equal(found.v, expected[1])
    assert found.k.is_contiguous() and found.k.untyped_storage().nbytes() == found.k.nbytes
    assert not found.k.requires_grad and store.get(key) is found and found.nbytes == BYTES


def test_the_longest_unused_goes_first():
    chunks = [chunk(i) for i in range(5)]
    store = ChunkStore(ram_bytes=3 * BYTES)
    for one in chunks[:3]:
        store.put(one)
    same(store.get(chunks[0].key), chunks[0])
    store.put(chunks[3])
    assert held(store, chunks) == [True, False, True, True, False]
    store.put(chunks[2])  # a put counts as use
    store.put(chunks[4])
    assert held(store, chunks) == [False, False, True, True, True]
    assert store.keys() == {chunks[i].key.digest for i in (2, 3, 4)}
    assert store.get(chunks[1].key) is None
    stats = store.stats()
    assert stats.ram == TierStats(hits=1, misses=1, evictions=2, entries=3, bytes=3 * BYTES, budget=3 * BYTES)
    assert (stats.hits, stats.misses, stats.refused, stats.disk, stats.pinned) == (1, 1, 0, TierStats(), TierStats())
    assert store.remove(chunks[2].key) and not store.remove(chunks[2].key)
    assert held(store, chunks) == [False, False, False, True, True] and store.stats().ram.bytes == 2 * BYTES
    store.clear()
    assert store.keys() == set() and store.stats().ram.bytes == 0 and store.stats().ram.evictions == 2


def test_a_large_chunk_makes_room_for_itself_and_one_over_the_budget_is_refused():
    small, large = [chunk(i) for i in range(3)], chunk(9, tokens=10)
    store = ChunkStore(ram_bytes=3 * BYTES)
    for one in small:
        store.put(one)
    store.put(large)
    assert held(store, [*small, large]) == [False, False, True, True]
    with pytest.raises(ValueError, match=f"a chunk of {4 * BYTES} bytes is over every budget: ram_bytes={3 * BYTES}"):
        store.put(chunk(1, tokens=20))
    assert held(store, [*small, large]) == [False, False, True, True]
    assert store.stats().ram.bytes == store.stats().ram.budget


def test_putting_again_replaces():
    store, new = ChunkStore(ram_bytes=2 * BYTES), chunk(1, seed=77, neighbours=("c" * 64,))
    store.put(chunk(1))
    store.put(new)
    same(store.get(new.key), new)
    assert store.stats().ram.entries == 1 and store.stats().ram.evictions == 0


def test_many_at_once_come_in_order():
    chunks = [chunk(i) for i in range(4)]
    store = ChunkStore()
    for one in chunks[:3]:
        store.put(one)
    found = store.get_many([chunks[i].key for i in (2, 3, 0, 2)])
    assert found[1] is None and found[0] is found[3]
    same(found[0], chunks[2])
    same(found[2], chunks[0])
    assert store.get_many([]) == [] and (store.stats().hits, store.stats().misses) == (2, 1)


@pytest.fixture
def page_locked(monkeypatch):
    """Page-locked memory without a GPU: addresses that were asked for as such."""
    empty, taken = torch.empty, {}

    def allocate(*args, pin_memory=False, **options):
        x = empty(*args, **options)
        if pin_memory:
            taken[x.data_ptr()] = x
        return x

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: x.data_ptr() in taken)


def moves_between_tiers(path):
    chunks = [chunk(i) for i in range(4)]
    store = ChunkStore(path, pinned_bytes=BYTES, ram_bytes=2 * BYTES)
    for one in chunks[:3]:
        store.put(one)

    def tiers():
        return [[c.key.digest in tier.chunks for c in chunks] for tier in store._memory.values()]

    assert tiers() == [[False, False, True, False], [True, True, False, False]]
    found = store.get(chunks[0].key)  # up, and the other one down
    same(found, chunks[0])
    assert found.k.is_pinned() and found.v.is_pinned()
    assert tiers() == [[True, False, False, False], [False, True, True, False]]
    store.put(chunks[3])
    assert tiers() == [[False, False, False, True], [True, False, True, False]]
    assert not any(c.k.is_pinned() for c in store._memory["ram"].chunks.values())
    stats = store.stats()
    assert stats.pinned == TierStats(hits=0, misses=1, evictions=4, entries=1, bytes=BYTES, budget=BYTES)
    assert stats.ram == TierStats(hits=1, misses=0, evictions=1, entries=2, bytes=2 * BYTES, budget=2 * BYTES)
    store.get(chunks[3].key)
    assert store.stats().pinned.hits == 1 and (store.get(chunks[1].key) is None) == (path is None)
    large = chunk(8, tokens=10)
    store.put(large)  # over the one budget, not over the other
    assert not store.get(large.key).k.is_pinned() and held(store, [large]) == [True]
    same(store.get(chunks[3].key), chunks[3])


def test_chunks_move_between_tiers(page_locked):
    moves_between_tiers(None)


def test_chunks_read_from_disk_go_to_pinned_memory(page_locked, tmp_path):
    moves_between_tiers(tmp_path)
    found = ChunkStore(tmp_path, pinned_bytes=BYTES).get(chunk(1).key)
    same(found, chunk(1))
    assert found.k.is_pinned() and found.v.is_pinned()
    large = chunk(8, tokens=10)
    assert not ChunkStore(tmp_path, pinned_bytes=BYTES, ram_bytes=0).get(large.key).k.is_pinned()


@pytest.mark.gpu
def test_page_locked_memory_of_cuda(tmp_path):
    moves_between_tiers(tmp_path)
    one = chunk(5)
    store = ChunkStore(pinned_bytes=BYTES)
    store.put(ChunkKV(one.key, one.k.cuda(), one.v.cuda()))
    same(store.get(one.key), one)
    assert store.get(one.key).k.is_pinned()


def test_shared_chunks_stay_as_they_are(tmp_path):
    chunks = [chunk(i) for i in range(6)]
    store = ChunkStore(tmp_path, ram_bytes=3 * BYTES, disk_bytes=5 * BYTES)
    for one in chunks[:3]:
        store.put(one)
    kept = store.get_many([c.key for c in chunks[:3]])
    versions = [(c.k._version, c.v._version) for c in kept]
    for _ in range(3):
        for one in chunks:
            if store.get(one.key) is None:
                store.put(one)
    assert [(c.k._version, c.v._version) for c in kept] == versions
    for found, expected in zip(kept, chunks):
        same(found, expected)


def test_threads_share_a_store(tmp_path):
    chunks = [chunk(i) for i in range(8)]
    store = ChunkStore(tmp_path, ram_bytes=3 * BYTES, disk_bytes=5 * BYTES + 5000)
    start = threading.Barrier(4)

    def work(seed):
        choose, looked = random.Random(seed), 0
        start.wait()
        for _ in range(60):
            one = choose.choice(chunks)
            what = choose.random()
            if what < 0.3:
                store.put(one)
            elif what < 0.35:
                store.remove(one.key)
            else:
                some = {one.key: one, **{c.key: c for c in choose.sample(chunks, 2)}}
                looked += len(some)
                for found in store.get_many(list(some)):
                    if found is not None:
                        same(found, some[found.key])
        return looked

    with ThreadPoolExecutor(4) as pool:
        looked = sum(pool.map(work, range(4)))
    stats = store.stats()
    assert stats.hits + stats.misses == looked and stats.ram.hits + stats.ram.misses == looked
    assert stats.disk.hits + stats.disk.misses == stats.ram.misses and stats.misses == stats.disk.misses
    ram = store._memory["ram"]
    assert ram.nbytes == sum(c.nbytes for c in ram.chunks.values()) <= 3 * BYTES
    assert stats.disk.bytes <= stats.disk.budget
