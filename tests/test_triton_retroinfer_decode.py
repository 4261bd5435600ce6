"""A decode step of RetroInfer in Triton against the portable backend in float64, and that one's reference.

Without a GPU Triton interprets, where bfloat16 is wrong: float16 and float32 here, bfloat16 on a GPU.
"""

import copy
import math

import pytest
import torch

from attnlab import WaveBuffer, WaveConfig, WaveIndex, wave_attention
from attnlab.kernels import configs
from attnlab.kernels.retroinfer import estimate, exact, launch, portable
from attnlab.kernels.retroinfer.exact import Cached
from attnlab.kernels.retroinfer.spec import Attended, Query, Spec, Store, budget, part
from attnlab.reference.wave_buffer import cluster_pages
from attnlab.testing import assert_accurate
from tests.wave_oracle import dense
from tests.wave_stores import QUERY, SPEC, Rows, answers, build, check, labels_of, planted, rows

LENGTHS = [131, 7, 0, 48]  # several segments, all steady, nothing, one short segment
SMALL = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So few clusters and keys at a time that short rows need several tiles and shares."""
    real = configs.get
    tiles = {name: {"BLOCK_N": 16} for name in ("score", "exact", "estimate")}
    tiles |= {"rank": {"BLOCK_T": 2}, "merge": {"BLOCK_S": 2}}
    monkeypatch.setattr(configs, "get", lambda name, *key: real(name, *key) | tiles.get(name.split(".")[1], {}))
    for module in (exact, estimate):
        monkeypatch.setattr(module, "shares", lambda *_: 2)


def run(x: Rows, store: Store, query: Query = QUERY, ratios=(0.1, 0.3), spec: Spec = SPEC, device="cpu", cache=None):
    """What the kernels answer, on the CPU."""
    clusters = store.clusters.tolist()
    store.budgets.copy_(torch.tensor([budget(*ratios, query.estimation, n) for n in clusters]))
    width = max(clusters) if query.max_error else part(ratios[0], max(clusters))
    moved = Store(*(t.to(device) for t in store))
    got = launch.attend(x.q.to(device), moved, query._replace(k_slots=width), spec, cache)
    return Attended(*(None if t is None else t.cpu() for t in got))


def wide(store: Store, dtype: torch.dtype = torch.float64) -> Store:
    return Store(*(t.to(dtype) if t.dtype.is_floating_point else t for t in store))


def compare(x: Rows, store: Store, got: Attended, query: Query, spec: Spec = SPEC, replay: bool = False) -> None:
    """`got` reads what float64 would, and errs no more than PyTorch in its own dtype."""
    query, chosen = query._replace(k_slots=got.chosen.shape[2]), got.chosen if replay else None
    truth = portable.attend(x.q.double(), wide(store), query, spec, chosen)
    plain = portable.attend(x.q, store, query, spec, truth.chosen)
    assert torch.equal(got.chosen, truth.chosen)
    assert got.out.dtype == x.q.dtype and got.lse.dtype == torch.float32
    assert_accurate(got.out, truth.out, plain.out, what="out")
    assert_accurate(got.lse, truth.lse, plain.lse, roundings=4, what="lse")
    for name in ("lower", "upper") if query.bounds else ():
        torch.testing.assert_close(getattr(got, name), getattr(plain, name), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "group, d, dtype, scale",
    [
        (1, 32, torch.float32, 0.2),
        (2, 80, torch.float16, -0.1),
        (3, 128, torch.float16, 0.1),
        (8, 32, SMALL, 0.2),
        (3, 256, SMALL, 0.06),
    ],
)
def test_ragged_rows(group, d, dtype, scale, device):
    x = rows(LENGTHS, group=group, d=d, dtype=dtype)
    store, query = build(x), QUERY._replace(scale=scale)
    got = run(x, store, query, device=device)
    compare(x, store, got, query)
    assert (got.out[2] == 0).all() and (got.lse[2] == -math.inf).all() and (got.upper[1:3] == 0).all()
    if dtype is torch.float32:
        check(x, got, answers(x, store, query), 2e-5)


@pytest.mark.parametrize(
    "estimation, reduce, weight, ratios",
    [
        ("ratio", "sum", True, (0.2, 0.3)),
        ("ratio", "max", True, (0.5, 1.0)),
        ("all", "max", False, (0.0, 0.0)),
        ("none", "mean", True, (0.3, 0.5)),
        ("ratio", "sum", False, (1.0, 0.5)),
    ],
)
def test_options(estimation, reduce, weight, ratios, device):
    """With slots that are empty among the others, and budgets of nothing and of everything."""
    spec = SPEC._replace(max_cluster=4)
    x = rows(LENGTHS, group=3, kv_heads=1, d=16, dtype=torch.float32)
    store = build(x, spec)
    assert (store.sizes[0, :, : int(store.clusters[0])] == 0).any()
    query = QUERY._replace(estimation=estimation, reduce=reduce, weight_by_size=weight)
    got = run(x, store, query, ratios, spec, device)
    compare(x, store, got, query, spec)
    check(x, got, answers(x, store, query, ratios, spec), 2e-5)


def test_everything_read_is_full_attention(device):
    x = rows([90, 33], group=2, d=16, dtype=torch.float32)
    got = run(x, build(x), QUERY._replace(bounds=False), (1.0, 0.0), device=device)
    for b in range(2):
        for mine, true in zip(got[:2], dense(x.q[b], x.k[b], x.v[b]), strict=True):
            torch.testing.assert_close(mine[b], true, rtol=2e-5, atol=2e-5)
    assert got.lower is None and got.upper is None


@pytest.mark.parametrize(
    "max_error, ratio, dtype", [(0.1, 0.05, torch.float16), (0.1, 1.0, torch.float16), (1e-9, 0.05, torch.float32)]
)
def test_adaptive_budget(max_error, ratio, dtype, device):
    """Which grows where the bound asks for it, and only there."""
    lengths = [131, 64, 0]
    x = rows(lengths, group=2, dtype=dtype)
    x = x._replace(k=[planted(n, 4).to(dtype) for n in lengths])
    store, query = build(x), QUERY._replace(max_error=max_error, reduce="max", scale=0.5)
    got = run(x, store, query, (ratio, 0.3), device=device)
    compare(x, store, got, query)
    counts = (got.chosen >= 0).sum(-1)
    if max_error == 1e-9 or ratio == 1.0:
        assert torch.equal(counts[0], (store.sizes[0] > 0).sum(-1))
    else:
        assert (got.upper <= max_error).all() and (counts[0] < (store.sizes[0] > 0).sum(-1)).any()
        assert (counts[0] > part(ratio, 32)).all()


def test_ties_go_to_the_lowest_slot(device):
    """Ten clusters of copies of four keys: scores are exact in every dtype."""
    x = rows([47], group=2, d=16, dtype=torch.float16)
    labels = (torch.arange(47) - 2).clamp(0, 39) // 4
    x = Rows(x.q.round(), [torch.eye(16)[labels % 4][:, None].expand(-1, 2, -1).half()], x.v)
    labels = labels.int().expand(2, -1)
    for ratios in ((0.1, 0.2), (0.3, 0.3), (0.5, 0.1)):
        store, query = build(x, labels=labels), QUERY._replace(scale=1.0)
        compare(x, store, run(x, store, query, ratios, device=device), query)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_that_is_not_finite_shows_in_its_heads(bad, device):
    x = rows([80, 20], group=2, dtype=torch.float32)
    store = build(x)
    clean = run(x, store, device=device)
    unread = next(c for c in range(int(store.clusters[0])) if store.sizes[0, 0, c] > 1 and c not in clean.chosen[0, 0])
    store.centroids[0, 0, unread] = bad
    store.k[0, 0, store.offsets[0, 0, unread]] = bad
    got = run(x, store, device=device)
    assert got.out[0, :2].isnan().all() and got.lse[0, :2].isnan().all()
    assert torch.equal(got.out[0, 2:], clean.out[0, 2:]) and torch.equal(got.out[1], clean.out[1])
    if math.isnan(bad):
        assert unread in got.chosen[0, 0]  # NaN ranks first
    got = run(x, store, QUERY._replace(estimation="none"), (0.0, 0.0), device=device)
    assert got.out[0, :2].isnan().all() and got.lse[0, :2].isnan().all() and got.out[0, 2:].isfinite().all()


def test_a_nan_in_the_steady_zone_or_the_query_stays_in_its_heads(device):
    x = rows([60, 48], group=2, dtype=torch.float32)
    store = build(x)
    clean = run(x, store, device=device)
    store.k_steady[1, 1, 0, 3] = math.nan
    x.q[0, 1, 2] = math.nan
    got = run(x, store, device=device)
    assert got.out[1, 2:].isnan().all() and got.lse[0, 1].isnan() and got.out[0, 1].isnan().all()
    assert torch.equal(got.out[1, :2], clean.out[1, :2]) and torch.equal(got.out[0, 2:], clean.out[0, 2:])


def test_what_is_not_read_never_counts(device):
    x = rows([131, 48], dtype=torch.float32)
    store = build(x, room=40)
    clean = run(x, store, ratios=(0.1, 0.2), device=device)
    for b, result in enumerate(answers(x, store, ratios=(0.1, 0.2))):
        count, indexed = result.retrieved.shape[1], int(store.indexed[b])
        for g in range(2):
            store.value_means[b, g, :count][~result.estimated[g]] = math.nan
            read = torch.isin(labels_of(store, b)[g], result.retrieved[g].nonzero()[:, 0])
            for held in (store.k, store.v):
                held[b, g, :indexed][~read[store.tokens[b, g, :indexed].long() - 2]] = math.nan
        for held in (store.centroids, store.value_means, store.radius):
            held[b, :, count:] = math.nan
        for held in (store.k, store.v):
            held[b, :, indexed:] = math.nan
        for held in (store.k_steady, store.v_steady):  # places that hold no token
            held[b, :, 2 + (len(x.k[b]) - 2) % SPEC.ring] = math.nan
    got = run(x, store, ratios=(0.1, 0.2), device=device)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


def cache_of(store: Store, page: int, seed: int) -> tuple[Cached, Store]:
    """A cache of about half of all pages in random places, and a store that lacks what the cache has."""
    g = torch.Generator().manual_seed(seed)
    (batch, heads, slots), (tokens, d) = store.radius.shape, store.k.shape[2:]
    pages = tokens // page + slots + 1
    capacity = pages // 2
    slot_map = torch.full((batch, heads, pages), -1, dtype=torch.int32)
    k, v = (torch.full((batch, heads, capacity, page, d), math.nan, dtype=store.k.dtype) for _ in "kv")
    left = store._replace(k=store.k.clone(), v=store.v.clone())
    for b in range(batch):
        for h in range(heads):
            places = torch.randperm(capacity, generator=g).tolist()
            for c in range(int(store.clusters[b])):
                begin, end = store.offsets[b, h, c : c + 2].tolist()
                for i, (number, held) in enumerate(cluster_pages(c, begin, end - begin, page).items()):
                    if not places or torch.rand(1, generator=g) < 0.5:
                        continue
                    place, at = places.pop(), slice(begin + i * page, begin + i * page + held)
                    slot_map[b, h, number] = place
                    for cache, whole, rest in ((k, store.k, left.k), (v, store.v, left.v)):
                        cache[b, h, place, :held] = whole[b, h, at]
                        rest[b, h, at] = math.nan
    return Cached(slot_map, k, v), left


@pytest.mark.parametrize("page, dtype", [(8, torch.float16), (3, torch.float32)])
def test_pages_in_a_cache_are_read_there(page, dtype, device, monkeypatch):
    x = rows([131, 7, 60], group=2, dtype=dtype)
    store = build(x)
    want = run(x, store, ratios=(0.4, 0.2), device=device)
    cached, left = cache_of(store, page, page)
    assert (cached.slot_map >= 0).sum() > 20 and left.k.isnan().any()
    seen = []

    def fetch(chosen, *_):
        seen.append(chosen.cpu())
        return Cached(*(t.to(device) for t in cached))

    monkeypatch.setattr(launch, "_fetch", fetch)
    got = run(x, left, ratios=(0.4, 0.2), device=device, cache=cached)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(seen) == 1 and torch.equal(seen[0], want.chosen)


def gaussian_index(device, tokens: int, seed: int = 5) -> tuple[torch.Generator, torch.Tensor, WaveIndex]:
    """Two rows of `tokens` tokens with room for 24 more, and these."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, tokens + 24, 2, 16, generator=g).to(device)
    config = WaveConfig(sink=2, local=6, segment=64, tokens_per_cluster=4, update_every=8)
    return g, x[:, :, tokens:], WaveIndex.build(*x[:, :, :tokens], config, capacity=tokens + 24)


@pytest.mark.parametrize("policy", ["clock", "lru"])
def test_a_wave_buffer_changes_no_bit(policy, device):
    """Through the public function, step after step; the cache goes through the same states as the portable one's."""
    if device.type == "cuda":
        pytest.importorskip("cuda.core")
    g, _, plain = gaussian_index(device, 150)
    index = copy.deepcopy(plain)  # a GPU's index with buffers is read through them only
    buffers = {name: WaveBuffer(index, 0.3, policy, page=3) for name in ("triton", "portable")}
    for _ in range(3):
        q = torch.randn(2, 1, 4, 16, generator=g).to(device)
        want = wave_attention(q, plain, retrieval_ratio=0.1, backend="triton")
        for name, buffer in buffers.items():
            got = wave_attention(q, index, retrieval_ratio=0.1, buffer=buffer, backend=name)
            assert name == "portable" or torch.equal(got, want)
    states = [buffer.cache[2:9] for buffer in buffers.values()]
    assert all(map(torch.equal, *states)) and buffers["triton"].stats().hits > 0


def test_reruns_are_bitwise_equal_and_shares_do_not_matter(device, monkeypatch):
    x = rows([90, 48], group=4, dtype=torch.float32)
    store, query = build(x), QUERY._replace(max_error=0.2)
    first, again = (run(x, store, query, device=device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for module in (exact, estimate):
        monkeypatch.setattr(module, "shares", lambda *_: 1)
    torch.testing.assert_close(run(x, store, query, device=device), first, rtol=1e-5, atol=1e-5)


def test_any_strides_of_q(device):
    x = rows([23, 9], group=2, dtype=torch.float32)
    store = build(x)
    apart = torch.stack([x.q, -x.q], 2)[:, :, 0]
    turned = x.q.mT.contiguous().mT
    want = run(x, store, device=device)
    for q in (apart, turned):
        assert torch.equal(run(x._replace(q=q), store, device=device).out, want.out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter reads what a GPU would not")
def test_nothing_is_read_on_the_host(monkeypatch):
    x = rows([60, 48], dtype=torch.float32)
    store = build(x)

    def refuse(self, *args):
        raise AssertionError("the host reads the device")

    query = QUERY._replace(max_error=0.2, k_slots=14)
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    launch.attend(x.q, store, query, SPEC)


@pytest.mark.gpu
def test_a_captured_step_follows_the_device(device):
    x = rows([131, 60], group=2, d=64, dtype=torch.float16)
    store = Store(*(t.to(device) for t in build(x, room=40)))
    query, q = QUERY._replace(k_slots=20), x.q.to(device)
    launch.attend(q, store, query, SPEC)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launch.attend(q, store, query, SPEC)
    for k in (0, 3, 9):
        store.budgets.copy_(torch.tensor([[k, 4], [k // 2, 2]]))
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert torch.equal(got.out, launch.attend(q, store, query, SPEC).out)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["clock", "lru"])
def test_a_captured_public_step_goes_on_after_growth(policy, device):
    """Over new queries and two updates, with a ratio that is not the configured one: what an eager step gives."""
    pytest.importorskip("cuda.core")
    g, new, index = gaussian_index(device, 150)
    buffer, other = (WaveBuffer(index, 1, policy, page=3) for _ in range(2))
    q, options = torch.zeros(2, 1, 4, 16, device=device), dict(retrieval_ratio=0.3, backend="triton")
    for held in (buffer, other):
        wave_attention(q, index, buffer=held, **options)
    graph, before = torch.cuda.CUDAGraph(), index.budgets(0.3, 0.232, "ratio").clone()
    with torch.cuda.graph(graph):
        out = wave_attention(q, index, buffer=buffer, **options)
    for t in range(24):
        q.copy_(torch.randn(q.shape, generator=g))
        graph.replay()
        assert torch.equal(out, wave_attention(q, index, buffer=other, **options))
        index.append(*new[:, :, t : t + 1])
    assert (index.budgets(0.3, 0.232, "ratio") > before).all()
    assert buffer.stats() == other.stats() and buffer.stats().hits > 0
