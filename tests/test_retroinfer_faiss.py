"""`WaveConfig(clustering="faiss")`: as good clusters as ours, fed through the same index."""

import builtins
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnlab import WaveConfig, WaveIndex, wave_faiss, wave_reference
from attnlab.kernels.retroinfer import portable_kmeans
from attnlab.kernels.retroinfer.spec import plan
from attnlab.testing import gaussian
from tests.wave_stores import planted

faiss = pytest.importorskip("faiss")

ROOT = Path(__file__).resolve().parent.parent

CONFIG = WaveConfig(sink=2, local=5, segment=40, tokens_per_cluster=4, iterations=4, update_every=12)
FAISS = WaveConfig(**CONFIG.__dict__ | dict(clustering="faiss"))
Q, K, V = gaussian(2, 1, 131, 4, 2, 8, dtype=torch.float64)


def quality(k, labels):
    """The objective of k-means: mean inner product of the centred keys with the direction of their cluster's sum."""
    found = []
    for g, chosen in enumerate(labels.long()):
        x = k[:, g].double() - k[:, g].double().mean(0)
        sums = torch.zeros(int(chosen.max()) + 1, x.shape[1], dtype=x.dtype).index_add_(0, chosen, x)
        found.append(sums.norm(dim=1).sum() / len(x))
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("iterations", [2, 10])
@pytest.mark.parametrize("final_pass", ["segment", "global"])
@pytest.mark.parametrize(
    "make",
    [
        lambda s: torch.randn(1500, 2, 32, generator=torch.Generator().manual_seed(s)),
        lambda s: planted(1500, 9, seed=s),
    ],
    ids=["noise", "planted"],
)
def test_quality_is_ours_within_two_per_cent(make, final_pass, iterations):
    config = WaveConfig(segment=600, final_pass=final_pass, iterations=iterations)
    for seed in range(2):
        k = make(seed).float()
        call = plan(config.spec, [(0, 0, len(k))], [0])
        ours, theirs = (f(k, call, config.spec) for f in (portable_kmeans.kmeans, wave_faiss.kmeans))
        assert theirs.min() >= 0 and theirs.max() < call.slots[0] and theirs.shape == ours.shape
        if final_pass == "segment":
            assert torch.equal(theirs // 38, ours // 38)  # 38 clusters of 600 tokens: segments do not mix
        assert quality(k, theirs) == pytest.approx(quality(k, ours), rel=0.02)
        assert torch.equal(theirs, wave_faiss.kmeans(k, call, config.spec))


def test_faiss_starts_where_we_do_and_runs_as_often(monkeypatch):
    k, asked, real = K[0].float(), [], faiss.Kmeans

    def spy(d, count, **options):
        asked.append((d, count, options["niter"], options["spherical"]))
        return real(d, count, **options)

    monkeypatch.setattr(faiss, "Kmeans", spy)
    one = CONFIG.spec._replace(iterations=1)
    call = plan(one, [(0, 0, 131)], [0])
    assert torch.equal(wave_faiss.kmeans(k, call, one), portable_kmeans.kmeans(k, call, one))
    assert asked == [(8, 10, 0, True)] * 6 + [(8, 3, 0, True)] * 2  # three segments of 40 and one of 11, two heads
    asked.clear()
    wave_faiss.kmeans(k, call, one._replace(iterations=7))
    assert {niter for _, _, niter, _ in asked} == {6}


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_an_index_of_faiss_clusters_is_an_index(backend, monkeypatch):
    """From the same start, and as no cluster runs empty, faiss finds our clusters; ours is not asked."""
    ours, theirs = (WaveConfig(**c.__dict__ | dict(max_cluster=5)) for c in (CONFIG, FAISS))

    def grown(config):
        index = WaveIndex.build(K[:, :90], V[:, :90], config, capacity=131, lengths=[90, 50], backend=backend)
        index.append(K[:, 90:], V[:, 90:])
        return index

    want = grown(ours)
    for where, name in ((portable_kmeans, "lloyd"), (wave_reference, "kmeans")):
        monkeypatch.setattr(where, name, None)
    index = grown(theirs)
    assert index.config == theirs and all(torch.equal(x, y) for x, y in zip(index.store, want.store, strict=True))


def test_singletons_and_half_precision():
    config = WaveConfig(**FAISS.__dict__ | dict(tokens_per_cluster=1))
    index = WaveIndex.build(K, V, config)
    assert (index.store.sizes[:, :, : index.clusters[0]] == 1).all()
    half = WaveIndex.build(K.half(), V.half(), FAISS)
    assert half.clusters == WaveIndex.build(K.half(), V.half(), CONFIG).clusters


def test_faiss_takes_our_threads_and_gives_its_own_back():
    """Imported first, faiss has an OpenMP of its own beside torch's; later it shares torch's."""
    script = """
import faiss, torch
from attnlab import WaveConfig, WaveIndex
real, seen = faiss.Kmeans, set()
faiss.Kmeans = lambda *args, **options: seen.add(faiss.omp_get_max_threads()) or real(*args, **options)
faiss.omp_set_num_threads(3)
torch.set_num_threads(2)
k = torch.randn(1, 100, 1, 8)
a, b = (WaveIndex.build(k, k, WaveConfig(local=4, clustering=name)).store.tokens for name in ("faiss", "native"))
assert seen == {2} and torch.equal(a, b)
assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == (3, 2)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_keys_that_are_not_finite_are_refused_and_nothing_changes(value):
    index = WaveIndex.build(K[:, :90], V[:, :90], FAISS, capacity=131)
    k, before = K[:, 90:].clone(), [x.clone() for x in index.store]
    k[1, 5, 0, 3] = value
    with pytest.raises(ValueError, match="WaveIndex: clustering='faiss' needs finite keys"):
        index.append(k, V[:, 90:])
    assert index.lengths == (90, 90) and all(torch.equal(x, y) for x, y in zip(index.store, before, strict=True))


def test_a_file_keeps_the_clusterer(tmp_path):
    WaveIndex.build(K, V, FAISS).save(tmp_path / "index")
    assert WaveIndex.load(tmp_path / "index").config.clustering == "faiss"


def test_without_faiss_the_error_names_the_extras(monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name == "faiss":
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    WaveIndex.build(K, V, CONFIG)
    with pytest.raises(ModuleNotFoundError, match=r"attnlab\[faiss-cpu\] or attnlab\[faiss-gpu\]"):
        WaveIndex.build(K, V, FAISS)
