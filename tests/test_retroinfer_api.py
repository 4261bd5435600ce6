"""`WaveIndex` and `wave_attention`: growth in any pieces, errors, registration with torch."""

import pytest
import torch

import attnlab
from attnlab import WaveConfig, WaveIndex, wave_attention, wave_reference
from attnlab.kernels.retroinfer.spec import part, slot_capacity
from attnlab.reference import retroinfer as reference
from attnlab.testing import assert_accurate, gaussian, plain_attention

CONFIG = WaveConfig(sink=2, local=5, segment=40, tokens_per_cluster=4, iterations=4, update_every=12)
RATIOS = dict(retrieval_ratio=0.3, estimation_ratio=0.4)
BACKENDS = ["portable", "reference"]
CLOSE = dict(rtol=1e-10, atol=1e-10)
Q, K, V = gaussian(3, 1, 131, 4, 2, 8, dtype=torch.float64)


def built(k=K, v=V, config=CONFIG, **options):
    return WaveIndex.build(k, v, config, **options)


def pieces(k, v, sizes, config=CONFIG, **options):
    """An index that takes `k, v` in parts of these sizes."""
    first, *others = zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)
    index = WaveIndex.build(*first, config, capacity=k.shape[1], **options)
    for piece in others:
        index.append(*piece)
    return index


def grown(k, v, sizes, config=CONFIG):
    """The reference's index of one row that came in parts of these sizes."""
    at, options = sizes[0], wave_reference.options(config.spec)
    index = reference.build_index(k[:at], v[:at], options)
    for n in sizes[1:]:
        at += n
        index = reference.extend_index(index, k[:at], v[:at], options)
    return index


def held(index, row):
    store, n, c = index.store, index.indexed[row], index.clusters[row]
    ends = dict(centroids=c, value_means=c, radius=c, offsets=c + 1, tokens=n, k=n, v=n)
    return {name: getattr(store, name)[row][:, :end] for name, end in ends.items()}


def assert_same(one, other):
    """Two indexes hold the same, bit for bit."""
    assert (one.lengths, one.indexed, one.clusters) == (other.lengths, other.indexed, other.clusters)
    for b, (length, indexed) in enumerate(zip(one.lengths, one.indexed, strict=True)):
        x, y = held(one, b), held(other, b)
        assert all(torch.equal(x[name], y[name]) for name in x)
        rows = [wave_reference.token_order(i.store, b, length, indexed, i.config.spec) for i in (one, other)]
        assert all(torch.equal(a, c) for a, c in zip(*rows, strict=True))
    for name in ("lengths", "indexed", "clusters", "budgets"):
        assert torch.equal(getattr(one.store, name), getattr(other.store, name))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[131], [70, 61], [100] + [1] * 31, [3, 3, 1, 50, 30, 1, 1, 42], [90, 11, 1, 29]])
def test_any_pieces_hold_what_the_reference_holds(sizes, backend):
    index = pieces(K, V, sizes, backend=backend)
    for b in range(3):
        want = grown(K[b], V[b], sizes)
        assert (index.lengths[b], index.indexed[b], index.clusters[b]) == (131, want.indexed, want.sizes.shape[1])
        row = wave_reference.token_order(index.store, b, 131, want.indexed, CONFIG.spec)
        assert torch.equal(row.k, K[b]) and torch.equal(row.v, V[b]) and torch.equal(row.labels, want.labels)
        assert torch.equal(held(index, b)["offsets"].diff(), want.sizes)
        live = want.sizes > 0
        found = (index.store.centroids, index.store.value_sums, index.store.radius)
        for x, y in zip(found, (want.centroids, want.value_sums, want.radius), strict=True):
            torch.testing.assert_close(x[b, :, : want.sizes.shape[1]][live], y[live], **CLOSE)
        assert (index.store.offsets[b, :, index.clusters[b] :] == want.indexed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(estimation="all", group_reduce="max"),
        dict(estimation="none", weight_by_size=True, group_reduce="mean"),
        dict(budget="adaptive", max_error=0.3),
        dict(max_cluster=5, final_pass="global"),
    ],
    ids=str,
)
def test_attention_of_ragged_rows_is_the_references(change, backend):
    config, sizes = WaveConfig(**CONFIG.__dict__ | RATIOS | change), [131, 60, 5]
    index = built(config=config, lengths=sizes)
    out, lse, bound = wave_attention(Q, index, return_lse=True, return_error_bound=True, backend=backend)
    for b, n in enumerate(sizes):
        k, v, options = K[b, :n], V[b, :n], wave_reference.options(config.spec)
        want = reference.wave_attention(
            Q[b, 0], k, v, reference.build_index(k, v, options), options, **RATIOS, estimation=config.estimation,
            group_reduce=config.group_reduce, weight_by_size=config.weight_by_size,
            max_error=config.max_error if config.budget == "adaptive" else None,
        )  # fmt: skip
        for x, y in zip((out, lse, *bound), (want.out, want.lse, want.lower, want.upper), strict=True):
            torch.testing.assert_close(x[b, 0], y, **CLOSE)
    assert (index.indexed[2], bound.upper[2].max()) == (0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratios_of_a_call_stand_in_for_the_configured_ones(backend):
    index = built()
    dense, lse = attnlab.full_attention(Q, K, V, return_lse=True)
    everything = wave_attention(Q, index, retrieval_ratio=1, return_lse=True, return_error_bound=True, backend=backend)
    torch.testing.assert_close(everything[:2], (dense, lse), **CLOSE)
    assert (everything[2].lower == 0).all() and (everything[2].upper == 0).all()
    configured = built(config=WaveConfig(**CONFIG.__dict__ | RATIOS))
    want = wave_attention(Q, configured, backend=backend)
    assert torch.equal(wave_attention(Q, index, backend=backend, **RATIOS), want)
    assert not torch.allclose(wave_attention(Q, index, backend=backend), want)
    none, _ = wave_attention(Q, index, retrieval_ratio=0, estimation="none", return_lse=True, backend=backend)
    steady = torch.cat([torch.arange(2), torch.arange(126, 131)])
    torch.testing.assert_close(none, attnlab.full_attention(Q, K[:, steady], V[:, steady], causal=False), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("selector", ["wave", "full", "oracle", "quest", "cluster"])
def test_selectors_read_what_the_references_do(selector, reduce, dtype):
    config = WaveConfig(**CONFIG.__dict__ | RATIOS | dict(group_reduce=reduce, tokens_per_cluster=3))
    q, k, v = (x.to(dtype) for x in (Q, K, V))
    index = built(k, v, config, lengths=[104, 60, 3])
    index.append(k[:, :25], v[:, :25], [25, 4, 3])
    tolerance = CLOSE if dtype is torch.float64 else dict(rtol=5e-3, atol=5e-3)
    for budget in (0.001, 0.1, 0.35, 1):
        for change in ({}, dict(estimation="all"), dict(scale=-0.7)):
            options = dict(selector=selector, token_budget=budget, return_lse=True, **change)
            found, want = (wave_attention(q, index, backend=backend, **options) for backend in BACKENDS)
            torch.testing.assert_close(found, want, **tolerance)
    dense = wave_attention(q, index, retrieval_ratio=1, return_lse=True, scale=-0.7, backend="reference")
    torch.testing.assert_close(found, dense, **tolerance)


@pytest.mark.parametrize("selector", ["wave", "oracle", "quest", "cluster"])
def test_not_finite_values_show_where_the_references_do(selector):
    options = dict(selector=selector, token_budget=0.1, return_lse=True)
    for change in (dict(k=torch.nan), dict(k=torch.inf), dict(v=torch.nan)):
        x = dict(k=K.clone(), v=V.clone())
        for name, value in change.items():
            x[name][:, 50:60, 0] = value
        index = built(**x)
        found, want = (wave_attention(Q, index, backend=backend, **options) for backend in BACKENDS)
        torch.testing.assert_close(found, want, equal_nan=True, **CLOSE)
        assert found[0][:, :, :2].isnan().any() or "v" in change
        assert found[0][:, :, 2:].isfinite().all()


@pytest.mark.parametrize("selector", ["wave", "oracle", "quest", "cluster"])
def test_ties_go_to_the_lowest_unit(selector):
    k = torch.eye(8, dtype=torch.float64)[torch.arange(131) % 4][None, :, None].expand(3, -1, 2, -1)
    index, q = built(k, V), Q.round()
    options = dict(selector=selector, token_budget=0.25, scale=1.0)
    found, want = (wave_attention(q, index, backend=backend, **options) for backend in BACKENDS)
    torch.testing.assert_close(found, want, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [dict(retrieval_ratio=1), dict(selector="full")], ids=str)
def test_everything_read_is_full_attention_in_any_dtype(options, dtype):
    q, k, v = (x.to(dtype) for x in (Q, K, V))
    truth = attnlab.full_attention(q.double(), k.double(), v.double(), backend="reference")
    plain, _ = plain_attention(q, k, v, torch.ones(1, 1, 1, 131, dtype=torch.bool))
    assert_accurate(wave_attention(q, pieces(k, v, [60, 71]), **options), truth, plain)


def test_budgets_follow_the_clusters():
    index = built(config=WaveConfig(**CONFIG.__dict__ | RATIOS), lengths=[131, 60, 5])
    for counts in ([31, 14, 0], [31, 24, 0]):
        assert list(index.clusters) == counts
        for estimation, e in (("ratio", [part(0.4, n) for n in counts]), ("none", [0, 0, 0])):
            want = [[part(0.3, n), e] for n, e in zip(counts, e, strict=True)]
            assert index.budgets(0.3, 0.4, estimation).tolist() == want
            assert estimation == "none" or index.store.budgets.tolist() == want
        index.append(K[:, :39], V[:, :39], [0, 39, 11])  # the last row's still wait


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_grow_by_their_own_lengths(backend):
    """Rows that take turns end as if each had been alone."""
    index = WaveIndex(3, 131, 2, 8, CONFIG, dtype=torch.float64, backend=backend)
    steps = [[50, 3, 0], [1, 1, 1], [0, 30, 4], [20, 7, 60], [0, 0, 30], [1, 1, 1]]
    at = [0, 0, 0]
    for counts in steps:
        k, v = (torch.stack([x[b].roll(-a, 0)[: max(counts)] for b, a in enumerate(at)]) for x in (K, V))
        index.append(k, v, torch.tensor(counts))
        at = [a + n for a, n in zip(at, counts, strict=True)]
    assert index.lengths == tuple(at)
    out, lse = wave_attention(Q, index, return_lse=True, **RATIOS)
    for b, n in enumerate(at):
        sizes = [s[b] for s in steps if s[b]]
        alone = pieces(K[b : b + 1, :n], V[b : b + 1, :n], sizes, backend=backend)
        assert (index.indexed[b], index.clusters[b]) == (alone.indexed[0], alone.clusters[0])
        one = wave_attention(Q[b : b + 1], alone, return_lse=True, **RATIOS)
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), one, **CLOSE)
        row = wave_reference.token_order(index.store, b, n, index.indexed[b], CONFIG.spec)
        assert torch.equal(row.k, K[b, :n]) and torch.equal(row.v, V[b, :n])


def test_left_padding_is_skipped():
    starts, n = [0, 31, 100], 131
    k, v = (x.clone() for x in (K, V))
    for b, s in enumerate(starts):
        k[b, :s] = v[b, :s] = torch.nan
    rows = [built(k[b : b + 1, s:], v[b : b + 1, s:]) for b, s in enumerate(starts)]
    index = built(k, v, starts=starts)
    assert index.lengths == tuple(n - s for s in starts)
    for b, row in enumerate(rows):
        found, want = held(index, b), held(row, 0)
        assert all(torch.equal(found[name], want[name]) for name in want)
    want = torch.cat([wave_attention(Q[b : b + 1], row) for b, row in enumerate(rows)])
    torch.testing.assert_close(wave_attention(Q, index), want, **CLOSE)
    both = built(k, v, starts=starts, lengths=[20, 90, 31])
    assert both.lengths == (20, 90, 31)
    assert torch.equal(held(both, 1)["tokens"], held(built(k[1:2, 31:121], v[1:2, 31:121]), 0)["tokens"])


def test_reset_and_reuse_is_a_fresh_index():
    index = pieces(K, V, [60, 71])
    addresses = [x.data_ptr() for x in index.store]
    index.reset()
    assert index.lengths == index.indexed == index.clusters == (0, 0, 0) and index.meta_bytes == index.kv_bytes == 0
    out, lse = wave_attention(Q, index, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    fresh = WaveIndex.build(V[:, :100], K[:, :100], CONFIG, capacity=131)
    index.append(V[:, :100], K[:, :100])
    for i in (index, fresh):
        i.append(V[:, 100:], K[:, 100:])
    assert_same(index, fresh)
    assert torch.equal(wave_attention(Q, index), wave_attention(Q, fresh))
    assert [x.data_ptr() for x in index.store] == addresses
    assert index.budgets(0.018, 0.232, "ratio") is index.store.budgets


def test_reset_leaves_nothing_of_old_values():
    """A row without tokens beside one that has some multiplies what lies in its places by 0."""
    index = built(V, K * torch.nan)
    index.reset()
    index.append(K, V, [0, 131, 1])
    fresh = built(lengths=[0, 131, 1])
    for options in (RATIOS, dict(retrieval_ratio=0)):
        found, want = (wave_attention(Q, i, return_lse=True, **options) for i in (index, fresh))
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True)) and (found[0][0] == 0).all()


def test_over_capacity_changes_nothing():
    index, twin = (built(K[:, :100], V[:, :100], capacity=120) for _ in range(2))
    for tokens, lengths in ((21, None), (31, [0, 21, 3])):
        with pytest.raises(ValueError, match=r"WaveIndex.append: row \d holds 100 tokens, 21 more .* capacity=120"):
            index.append(K[:, 100 : 100 + tokens], V[:, 100 : 100 + tokens], lengths)
        assert_same(index, twin)
    index.append(K[:, 100:120], V[:, 100:120])
    with pytest.raises(ValueError, match="row 0 holds 120 tokens, 1 more pass the index's capacity=120"):
        index.append(K[:, 120:121], V[:, 120:121])
    with pytest.raises(ValueError, match=r"WaveIndex.build: row 0 holds 0 tokens, 131 more .* capacity=130"):
        built(capacity=130)


def test_slots_are_enough_for_the_worst_pieces():
    config = WaveConfig(sink=0, local=0, segment=4, tokens_per_cluster=4, iterations=1, update_every=4, max_cluster=4)
    index = pieces(K, V, [5, 5, 5, 5, 5, 5, 5, 5, 91], config)
    assert index.indexed == (131,) * 3 and max(index.clusters) <= slot_capacity(131, config.spec)


def test_bytes():
    index = WaveIndex.build(*(torch.randn(2, 1000, 3, 64) for _ in "kv"), capacity=5000)
    assert index.clusters == (59, 59) and index.kv_bytes == 2 * 1000 * 3 * 2 * 64 * 4
    assert index.meta_bytes == 2 * 59 * 3 * (2 * 64 * 4 + 8)
    assert "lengths=[1000, 1000]" in repr(index)


def test_explain():
    found = attnlab.explain(wave_attention, Q, built())
    assert (found.fn, found.chosen, list(found.reasons)) == ("wave_attention", "portable", ["triton", *BACKENDS])
    assert attnlab.explain(WaveIndex.build, K, V, CONFIG, backend="reference").chosen == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [False, True])
def test_opcheck(backend, bounds):
    index = built(lengths=[131, 60, 5])
    query = (0.3, "sum", False, "ratio", part(0.3, max(index.clusters)), 0.0, bounds, "wave", None, 0, 0)
    store = index.store._replace(budgets=index.budgets(0.3, 0.4, "ratio"))
    args = (Q[:, 0], *store, *CONFIG.spec, *query, [], "clock", backend)
    torch.library.opcheck(torch.ops.attnlab.wave_attention.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    k, v, q = K.float(), V.float(), Q.float()
    want = wave_attention(q, pieces(k, v, [100, 31], backend=backend), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = wave_attention(q, pieces(k, v, [100, 31], backend=backend), backend=backend)
    assert torch.equal(found, want)


def test_compiles_whole():
    index = pieces(K, V, [60, 71])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def fn(q):
        return wave_attention(q, index, return_lse=True, return_error_bound=True, **RATIOS)

    torch.testing.assert_close(fn(Q), wave_attention(Q, index, return_lse=True, return_error_bound=True, **RATIOS))
