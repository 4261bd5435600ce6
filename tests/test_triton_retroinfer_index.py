"""RetroInfer's index and public functions with `backend="triton"`: k-means against the reference's, growth, opcheck."""

import math

import pytest
import torch

import attnlab
from attnlab import BackendError, WaveBuffer, WaveConfig, WaveIndex, wave_attention
from attnlab.kernels import configs
from attnlab.kernels.retroinfer import exact, launch
from attnlab.kernels.retroinfer.assign import assign
from attnlab.kernels.retroinfer.spec import Spec, plan
from attnlab.kernels.retroinfer.update import update
from attnlab.reference import retroinfer as reference
from attnlab.testing import assert_accurate, gaussian
from tests.wave_stores import SPEC, options, planted, rows

CONFIG = WaveConfig(
    sink=2, local=5, segment=40, tokens_per_cluster=4, iterations=3, update_every=12, retrieval_ratio=0.2,
    estimation_ratio=0.3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    real = configs.get
    tiles = {"assign": {"BLOCK_M": 64, "BLOCK_N": 8}, "update": {"BLOCK_N": 16}}
    monkeypatch.setattr(configs, "get", lambda name, *key: real(name, *key) | tiles.get(name.split(".")[1], {}))


@pytest.mark.parametrize("spec", [SPEC, SPEC._replace(global_pass=True), SPEC._replace(max_cluster=5, segment=48)])
@pytest.mark.parametrize("dtype", [torch.float16])
def test_separated_keys_get_the_references_labels(spec: Spec, dtype, device):
    """Segments of both rows, full and short ones."""
    k = planted(130, 4).to(dtype)
    ranges = [(3, 10, 108), (0, 108, 130)]
    labels = launch.kmeans(k.to(device), plan(spec, ranges, [0, 9, 9, 2]), spec).cpu()
    for _, a, b in ranges:
        for g in range(2):
            assert torch.equal(labels[g, a:b].long(), reference.segmented_kmeans(k[a:b, g], options(spec))[0])
    assert (labels[:, :10] == -1).all()


@pytest.mark.parametrize("spec", [SPEC, SPEC._replace(segment=128, global_pass=True)])
def test_the_objective_is_the_references(spec: Spec, device):
    k = rows([110], kv_heads=2, d=24).k[0].float()
    call = plan(spec, [(0, 0, 110)], [0])
    labels = launch.kmeans(k.to(device), call, spec)
    assert torch.equal(labels, launch.kmeans(k.to(device), call, spec))
    for g in range(2):
        x = k[:, g].double() - k[:, g].double().mean(0)
        mine, theirs = (
            reference.total(x, chosen.long(), 40).norm(dim=1).sum()
            for chosen in (labels[g].cpu(), reference.segmented_kmeans(k[:, g], options(spec))[0])
        )
        assert abs(mine / theirs - 1) < 1e-3


def test_assignment_over_tiles(device):
    """The score of the chosen centroid is the best there is, to float32's rounding, of every key of every problem."""
    g = torch.Generator().manual_seed(0)
    x, centroids = torch.randn(3, 37, 80, generator=g), torch.randn(3, 41, 80, generator=g)
    labels = assign(x.to(device), centroids.to(device)).cpu().long()
    scores = x.double() @ centroids.double().mT
    loss = scores.amax(-1) - scores.gather(-1, labels[..., None])[..., 0]
    assert (loss <= 64 * torch.finfo(torch.float32).eps * x.double().norm(dim=-1)).all()
    assert labels.max() > 32 and labels.unique().numel() > 20


def test_ties_go_to_the_lowest_and_nan_to_the_first(device):
    """Over the border of a tile of centroids, too."""
    x = torch.zeros(1, 5, 16, device=device)
    x[0, :4, 0] = torch.tensor([1.0, -1.0, 0.0, math.nan])
    centroids = torch.zeros(1, 40, 16, device=device)
    centroids[0, :, 0] = torch.tensor([0.0, 2.0, -1.0, -3.0] * 10)
    assert assign(x, centroids).tolist() == [[1, 3, 0, 0, 0]]
    centroids[0, 17, 0], centroids[0, 18, 0] = math.nan, math.inf
    assert assign(x, centroids).tolist() == [[17, 17, 17, 0, 17]]
    assert assign(torch.ones_like(x), -torch.ones_like(centroids[:, :5])).tolist() == [[0] * 5]


def test_update_sums_members_in_their_order(device):
    """Clusters of no, one and very many keys; what has no direction stays."""
    g = torch.Generator().manual_seed(0)
    x, old = torch.randn(2, 70, 24, generator=g), reference.normalise(torch.randn(2, 9, 24, generator=g))
    labels = torch.randint(0, 4, (2, 70), generator=g).int()
    labels[0, 10:60], labels[1, 5], labels[1, 6:8] = 5, 8, 7
    x[1, 7] = -x[1, 6]
    new = update(x.to(device), labels.to(device), old.to(device)).cpu()
    assert torch.equal(new, update(x.to(device), labels.to(device), old.to(device)).cpu())
    for p in range(2):
        sums = reference.total(x[p].double(), labels[p].long(), 9)
        norm = sums.norm(dim=1, keepdim=True)
        truth = torch.where(norm > 0, sums / norm, old[p].double())
        plain = reference.total(x[p], labels[p].long(), 9)
        plain = torch.where(norm > 0, plain / plain.norm(dim=1, keepdim=True), old[p])
        assert_accurate(new[p], truth, plain, roundings=2)
        gone = norm[:, 0] == 0
        assert gone.any() and torch.equal(new[p][gone], old[p][gone])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_public_functions_serve_an_index_that_grows(dtype, device):
    """Ragged rows, an update while decoding and both error bounds."""
    q, k, v = gaussian(3, 1, 70, 6, 2, 16, dtype=dtype, seed=3)
    k = (k.float() + 3 * planted(70, 4)[None].float()).to(dtype)
    built = {}
    for backend in ("triton", "reference"):
        index = WaveIndex.build(
            *(x[:, :55].to(device) for x in (k, v)), CONFIG, lengths=[55, 6, 0], capacity=90, backend=backend
        )
        index.append(*(x[:, 55:].to(device) for x in (k, v)), [15, 3, 15])
        assert index.backend == backend and index.indexed[0] == 63
        built[backend] = index
    assert torch.equal(built["triton"].store.tokens, built["reference"].store.tokens)
    options = dict(return_lse=True, return_error_bound=True)
    out, lse, bound = wave_attention(q.to(device), built["triton"], backend="triton", **options)
    want, want_lse, wanted = wave_attention(q.to(device), built["triton"], backend="reference", **options)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, want, rtol=4 * eps, atol=max(4 * eps, 5e-6))
    for x, y in zip((lse, *bound), (want_lse, *wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5 * eps)
    dense = attnlab.full_attention(q[:1].double(), k[:1].double(), v[:1].double(), backend="reference")
    everything = wave_attention(q.to(device), built["triton"], retrieval_ratio=1, backend="triton")
    torch.testing.assert_close(everything[:1].cpu().double(), dense, rtol=4 * eps, atol=max(4 * eps, 5e-6))


def test_who_serves(device):
    q, k, v = gaussian(1, 1, 40, 2, 1, 16, device=device)
    index = WaveIndex.build(k, v, CONFIG)
    assert list(attnlab.explain(wave_attention, q, index).reasons) == ["triton", "portable", "reference"]
    assert attnlab.explain(wave_attention, q, index, backend="triton").chosen == "triton"
    with pytest.raises(BackendError, match="triton: selector and token_budget are for portable and reference"):
        wave_attention(q, index, selector="quest", token_budget=0.1, backend="triton")
    with pytest.raises(BackendError, match="dtype float64 is not one of"):
        WaveIndex.build(k.double(), v.double(), CONFIG, backend="triton")


@pytest.mark.parametrize("bounds, buffered", [(False, False), (True, False), (False, True)])
def test_opcheck(bounds, buffered, device, monkeypatch):
    if buffered and device.type == "cuda":
        pytest.skip("opcheck's copies of k and v are not in pinned memory")
    monkeypatch.setattr(exact, "shares", lambda *_: 2)
    q, k, v = gaussian(2, 1, 40, 2, 1, 16, device=device)
    index = WaveIndex.build(k, v, CONFIG, lengths=[40, 5], backend="triton")
    query = (0.3, "sum", False, "ratio", 3, 0.0, bounds, "wave", None, 0, 0)
    cache = list(WaveBuffer(index, 1, "lru", page=3).cache[:-1]) if buffered else []
    args = (q[:, 0], *index.store, *CONFIG.spec, *query, cache, "lru", "triton")
    torch.library.opcheck(torch.ops.attnlab.wave_attention.default, args)
