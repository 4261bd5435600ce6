"""`WaveBuffer` under `wave_attention`: the same outputs, and what happens to it while its index lives."""

import copy
import gc

import pytest
import torch

import attnlab
from attnlab import WaveBuffer, WaveConfig, WaveIndex, WaveStats, wave_attention
from attnlab.kernels.retroinfer.spec import budget, part
from attnlab.testing import gaussian

CONFIG = WaveConfig(sink=2, local=5, segment=40, tokens_per_cluster=4, iterations=4, update_every=12)
RATIOS = dict(retrieval_ratio=0.2, estimation_ratio=0.4)
POLICIES = ("clock", "lru")
BACKENDS = ("portable", "reference")
Q, K, V = gaussian(3, 1, 131, 4, 2, 8, dtype=torch.float64)


def built(config=CONFIG, dtype=torch.float64, lengths=(131, 60, 5), **options):
    return WaveIndex.build(K.to(dtype), V.to(dtype), config, lengths=lengths, capacity=220, **options)


def queries(steps, dtype=torch.float64, heads=4):
    """Each step's query is close to the one before."""
    rng, q = torch.Generator().manual_seed(1), torch.zeros(3, 1, heads, 8)
    for _ in range(steps):
        q = 0.7 * q + torch.randn(q.shape, generator=rng)
        yield q.to(dtype)


def assert_held(buffer):
    """Cached pages are what the index holds, and the map leads to them."""
    cache, store, page = buffer.cache, buffer.index.store, buffer.page
    for b in range(buffer.index.batch):
        for g in range(store.k.shape[1]):
            offsets = store.offsets[b, g].tolist()
            for c in range(buffer.index.clusters[b]):
                for i in range(-(-(offsets[c + 1] - offsets[c]) // page)):
                    first = offsets[c] + i * page
                    place, n = int(cache.slot_map[b, g, offsets[c] // page + c + i]), min(page, offsets[c + 1] - first)
                    if place >= 0:
                        assert torch.equal(cache.k[b, g, place, :n], store.k[b, g, first : first + n])
                        assert torch.equal(cache.v[b, g, place, :n], store.v[b, g, first : first + n])
    assert torch.equal((cache.slot_map >= 0).sum(-1), (cache.pages >= 0).sum(-1))


def assert_same_state(one, other):
    for name, x, y in zip(one.cache._fields[2:-1], one.cache[2:-1], other.cache[2:-1], strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    "policy, dtype, heads, page, budget",
    [
        ("clock", torch.float64, 4, 8, 0.4),
        ("lru", torch.float32, 2, 3, 0.5),
        ("clock", torch.float16, 8, 1, 0.3),
        ("lru", torch.bfloat16, 4, 5, 0.4),
    ],
)
def test_a_buffer_changes_no_bit_while_the_index_grows(policy, dtype, heads, page, budget):
    index = built(dtype=dtype)
    twin = built(dtype=dtype)
    with WaveBuffer(index, budget, policy, page=page) as buffer:
        for step, q in enumerate(queries(15, dtype, heads)):
            if step % 6 == 5:
                x = torch.cat([K, V], 1)[:, step : step + 30].to(dtype)
                for i in (index, twin):
                    i.append(x, x, [13, 0, 30])
            options = dict(RATIOS, return_lse=True, return_error_bound=True)
            found, want = wave_attention(q, index, buffer=buffer, **options), wave_attention(q, twin, **options)
            assert all(torch.equal(x, y) for x, y in zip([*found[:2], *found[2]], [*want[:2], *want[2]], strict=True))
        assert_held(buffer)
        stats = buffer.stats()
        assert stats.steps == 15 and min(stats.hits, stats.misses, stats.evictions) > 20
        assert stats.hit_ratio == stats.hits / (stats.hits + stats.misses)


@pytest.mark.parametrize(
    "policy, change",
    [
        ("clock", dict(estimation="all", group_reduce="max")),
        ("clock", dict(budget="adaptive", max_error=0.9)),
        ("lru", dict(budget="adaptive", max_error=0.9)),
        ("lru", dict(max_cluster=5)),
    ],
    ids=str,
)
def test_backends_keep_the_same_cache(policy, change):
    config = WaveConfig(**CONFIG.__dict__ | RATIOS | change)
    indexes = [built(config) for _ in BACKENDS]
    buffers = [WaveBuffer(index, 1 if "budget" in change else 0.5, policy, page=3) for index in indexes]
    for q in queries(5):
        found, want = (
            wave_attention(q, buffer.index, buffer=buffer, backend=name)
            for buffer, name in zip(buffers, BACKENDS, strict=True)
        )
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
        assert_same_state(*buffers)
        assert_held(buffers[1])
    assert buffers[0].stats() == buffers[1].stats() and buffers[0].stats().hits > 20


@pytest.mark.parametrize("policy", POLICIES)
def test_one_page(policy):
    """Whole clusters are pages, and there is a place for one."""
    index = built()
    buffer = WaveBuffer(index, 1e-9, policy, page=131)
    for q in [*queries(6)] * 2:
        found, want = (wave_attention(q, index, buffer=b, retrieval_ratio=1e-9) for b in (buffer, None))
        assert torch.equal(found, want)
    assert buffer.capacity == 1 and buffer.stats().misses > 6 and buffer.stats().hits > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_fits(backend):
    index = built(backend=backend)
    buffer = WaveBuffer(index, 1)
    want = attnlab.full_attention(Q[:1], K[:1], V[:1])
    for _ in range(3):
        out = wave_attention(Q, index, buffer=buffer, retrieval_ratio=1, backend=backend)
        torch.testing.assert_close(out[:1], want, rtol=1e-10, atol=1e-10)
    stats, sizes = buffer.stats(), index.store.sizes
    pages = int(((sizes + 7) // 8).sum())
    assert (stats.misses, stats.hits, stats.evictions) == (pages, 2 * pages, 0)
    assert stats.bytes == int(sizes.sum()) * 2 * 8 * 8 and stats.hit_ratio == 2 / 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_pages_than_places_is_an_error_and_nothing_is_lost(backend):
    index = built(backend=backend)
    buffer = WaveBuffer(index, 0.4)
    wave_attention(Q, index, buffer=buffer, backend=backend, **RATIOS)
    before = [x.nan_to_num() for x in buffer.cache[:-1]]
    with pytest.raises(ValueError, match=r"wave_attention: row 0, KV head \d asks for \d+ pages .* cache holds 10:"):
        wave_attention(Q, index, buffer=buffer, retrieval_ratio=0.9, backend=backend)
    assert all(torch.equal(x.nan_to_num(), y) for x, y in zip(buffer.cache[:-1], before, strict=True))
    want = wave_attention(-Q, index, backend=backend, **RATIOS)
    assert torch.equal(wave_attention(-Q, index, buffer=buffer, backend=backend, **RATIOS), want)
    assert buffer.stats().steps == 2


def test_a_refusal_noted_on_the_device_shows_when_asked():
    buffer = WaveBuffer(built(), 0.4)
    buffer.check()
    buffer.cache.overflow[1, 1] = 77
    sizes = r"row 1, KV head 1 asks for 77 pages of 8 vectors in one step, its cache holds 10"
    for fn, call in (("stats", buffer.stats), ("check", buffer.check)):
        with pytest.raises(ValueError, match=rf"WaveBuffer.{fn}: {sizes}"):
            call()
    buffer.reset()
    buffer.check()
    assert buffer.stats().steps == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_reset_and_reuse_is_a_fresh_buffer(policy):
    index = built()
    buffer, other = WaveBuffer(index, 0.5, policy), WaveBuffer(index, 1, policy)
    addresses = [x.data_ptr() for x in buffer.cache[:-1]]
    for q in queries(6):
        wave_attention(q, index, buffer=buffer, **RATIOS)
        wave_attention(q, index, buffer=other, **RATIOS)
    index.reset()
    assert buffer.stats() == WaveStats(0, 0, 0, 0, 0, buffer.capacity, 8, buffer.stats().cache_bytes)
    assert other.stats().hit_ratio == 0
    out, lse = wave_attention(Q, index, buffer=buffer, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    buffer.reset()
    index.append(V, K)
    fresh = WaveIndex.build(V, K, CONFIG, capacity=220)
    twin = WaveBuffer(fresh, 0.5, policy)
    for q in queries(6):
        found, want = (wave_attention(q, b.index, buffer=b, **RATIOS) for b in (buffer, twin))
        assert torch.equal(found, want)
        assert_same_state(buffer, twin)
    assert_held(buffer)
    assert buffer.stats() == twin.stats() and buffer.stats().evictions > 0
    assert [x.data_ptr() for x in buffer.cache[:-1]] == addresses


def test_an_update_keeps_the_cached_pages():
    index = built()
    buffer = WaveBuffer(index, 1)
    wave_attention(Q, index, buffer=buffer, retrieval_ratio=1)
    before, pages = buffer.stats().misses, buffer.cache.pages.clone()
    index.append(K[:, :30], V[:, :30], [30, 0, 12])
    old = int(((index.store.sizes[:, :, : index.clusters[0]] + 7) // 8).sum())
    out = wave_attention(Q, index, buffer=buffer, retrieval_ratio=1)
    assert torch.equal(out, wave_attention(Q, index, retrieval_ratio=1))
    assert torch.equal(buffer.cache.pages[pages >= 0], pages[pages >= 0])
    assert buffer.stats().misses == old and buffer.stats().hits == before < old
    assert_held(buffer)


def test_sizes_and_lifetime(tmp_path):
    index = built()
    buffer = WaveBuffer(index, 0.3, page=4)
    assert buffer.capacity == int(0.3 * (220 - 7)) // 4 == 15
    assert buffer.stats().cache_bytes == 3 * 2 * 15 * 4 * 2 * 8 * 8
    assert repr(buffer) == "WaveBuffer(15 pages of 4 vectors for each row and KV head, policy='clock')"
    other = WaveBuffer(index, 0.5, "lru")
    for q in queries(3):
        wave_attention(q, index, buffer=buffer, retrieval_ratio=0.05)
    assert other.stats().steps == 0 and buffer.stats().steps == 3
    index.save(tmp_path / "index")
    again = WaveIndex.load(tmp_path / "index")
    assert torch.equal(wave_attention(Q, again, buffer=WaveBuffer(again)), wave_attention(Q, index))
    with buffer:
        pass
    assert buffer.closed and repr(buffer) == "WaveBuffer(closed, policy='clock')"
    buffer.close()
    del other
    gc.collect()
    assert len(index._buffers) == 0
    index.reset()
    tiny = WaveBuffer(WaveIndex(1, 5, 2, 8, CONFIG))
    x = torch.randn(1, 5, 2, 8)
    tiny.index.append(x, x)
    assert torch.equal(wave_attention(x[:, :1], tiny.index, buffer=tiny), wave_attention(x[:, :1], tiny.index))


def test_a_copy_has_the_buffers_that_are_copied_with_it():
    index = built()
    buffer, closed = WaveBuffer(index, 0.5), WaveBuffer(index)
    closed.close()
    for q in queries(3):
        wave_attention(q, index, buffer=buffer, **RATIOS)
    alone, (twin, shut, other) = copy.deepcopy(index), copy.deepcopy((buffer, closed, index))
    assert len(alone._buffers) == 0 and list(other._buffers) == [twin] and twin.index is shut.index is other
    assert twin.stats() == buffer.stats() and shut.closed
    assert torch.equal(wave_attention(Q, other, buffer=twin, **RATIOS), wave_attention(Q, index, **RATIOS))
    assert twin.stats().steps == 4 and buffer.stats().steps == 3
    other.reset()
    assert twin.stats().steps == 0 and buffer.stats().steps == 3 and index.lengths == (131, 60, 5)


def test_budgets_keep_their_addresses_and_count_what_is_there():
    """A CUDA graph of a step reads them after the index has grown."""
    index, ratios = built(), [(0.3, 0.2, "ratio"), (0.1, 0.9, "all"), (0.5, 0.2, "none")]
    ratios.append((CONFIG.retrieval_ratio, CONFIG.estimation_ratio, CONFIG.estimation))
    held = {key: index.budgets(*key) for key in ratios}
    with torch.inference_mode():
        held[0.7, 0.2, "ratio"] = index.budgets(0.7, 0.2, "ratio")
    assert held[ratios[-1]] is index.store.budgets

    def check():
        for key, found in held.items():
            assert index.budgets(*key) is found and found.dtype == torch.int32
            assert found.tolist() == [[*budget(*key, n)] for n in index.clusters]

    before = index.clusters
    check()
    index.append(K[:, :30], V[:, :30], [30, 0, 12])
    assert index.clusters > before
    check()
    index.reset()
    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_opcheck(backend, policy):
    index = built()
    buffer = WaveBuffer(index, 0.5, policy)
    query = (0.3, "sum", False, "ratio", part(0.2, max(index.clusters)), 0.0, True, "wave", None, 0, 0)
    store = index.store._replace(budgets=index.budgets(0.2, 0.4, "ratio"))
    args = (Q[:, 0], *store, *CONFIG.spec, *query, list(buffer.cache[:-1]), policy, backend)
    torch.library.opcheck(torch.ops.attnlab.wave_attention.default, args)


def test_compiles_whole():
    index, twin = built(), built()
    buffers = [WaveBuffer(i, 0.5) for i in (index, twin)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def fn(q):
        return wave_attention(q, index, buffer=buffers[0], **RATIOS)

    for q in queries(3):
        torch.testing.assert_close(fn(q), wave_attention(q, twin, buffer=buffers[1], **RATIOS))
        assert_same_state(*buffers)


@pytest.mark.gpu
def test_a_cuda_index_gives_its_clusters_to_pinned_memory():
    index = WaveIndex.build(K.cuda(), V.cuda(), CONFIG, capacity=220)
    want = wave_attention(Q.cuda(), index, **RATIOS)
    buffer = WaveBuffer(index, 0.5)
    assert index.store.k.is_pinned() and index.store.v.is_pinned() and buffer.cache.k.is_cuda
    for backend in BACKENDS:
        torch.testing.assert_close(wave_attention(Q.cuda(), index, buffer=buffer, backend=backend, **RATIOS), want)
    with pytest.raises(ValueError, match="index keeps its keys and values in host memory"):
        wave_attention(Q.cuda(), index)
    index.append(K[:, :30].cuda(), V[:, :30].cuda())
    wave_attention(Q.cuda(), index, buffer=buffer, **RATIOS)
    assert buffer.stats().steps == 3
    for x, found in zip((K, V), index.row(1), strict=True):
        assert found.is_cuda and torch.equal(found.cpu(), torch.cat([x[1], x[1, :30]]))
    assert copy.deepcopy(index).store.k.is_pinned()
