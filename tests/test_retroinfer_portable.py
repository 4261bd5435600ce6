"""RetroInfer's portable index against the reference's, row by row."""

import math

import pytest
import torch

from attnlab.kernels.retroinfer import portable
from attnlab.kernels.retroinfer.portable_kmeans import assign
from attnlab.kernels.retroinfer.spec import Spec, Store, plan
from attnlab.reference import retroinfer as reference
from tests.wave_stores import LENGTHS, SPEC, Rows, ask, build, index_of, labels_of, options, planted, rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [SPEC, SPEC._replace(global_pass=True), SPEC._replace(max_cluster=5, segment=48)])
def test_separated_keys_get_the_references_labels(spec: Spec, dtype: torch.dtype) -> None:
    k = planted(160, 4).to(dtype)
    ranges = [(3, 10, 138), (0, 138, 160)]
    labels = portable.kmeans(k, plan(spec, ranges, [0, 9, 9, 2]), spec)
    for _, a, b in ranges:
        for g in range(2):
            assert torch.equal(labels[g, a:b].long(), reference.segmented_kmeans(k[a:b, g], options(spec))[0])
    assert (labels[:, :10] == -1).all()


@pytest.mark.parametrize("global_pass", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_few_iterations_of_random_keys(iterations: int, global_pass: bool) -> None:
    """In float64 there are no near ties, so every label counts, long before anything has converged."""
    spec = SPEC._replace(iterations=iterations, global_pass=global_pass)
    k = rows([130]).k[0]
    labels = portable.kmeans(k, plan(spec, [(0, 0, 130)], [0]), spec)
    for g in range(2):
        assert torch.equal(labels[g].long(), reference.segmented_kmeans(k[:, g], options(spec))[0])


@pytest.mark.parametrize("lengths", [(97,), (40, 33, 8), (1,)])
def test_one_iteration(lengths: tuple[int, ...]) -> None:
    k = rows([sum(lengths)]).k[0].float()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    ranges = [(b, end - n, end) for b, (n, end) in enumerate(zip(lengths, ends, strict=True))]
    call = plan(SPEC, ranges, [0] * len(lengths))
    g = torch.Generator().manual_seed(1)
    given = reference.normalise(torch.randn(2, sum(call.clusters), 16, generator=g))
    labels, new = portable.iterate(k, given, call, SPEC)
    column = 0
    for row, start, length, count, first in zip(*call[:5], strict=True):
        _, a, b = ranges[row]
        for head in range(2):
            x = (k[a:b, head] - k[a:b, head].mean(0))[start - a : start - a + length].double()
            old = given[head, column : column + count]
            mine = labels[head, start : start + length].long() - first
            scores = x @ old.double().T
            loss = scores.amax(1) - scores.gather(1, mine[:, None])[:, 0]
            assert (loss <= 64 * torch.finfo(torch.float32).eps * x.norm(dim=1)).all()
            sums = reference.total(x, mine, count)
            wanted = torch.where(sums.norm(dim=1, keepdim=True) > 1e-5, reference.normalise(sums), old.double())
            if len(lengths) != 1 or length > 1:  # the direction of one key minus itself is noise
                torch.testing.assert_close(new[head, column : column + count].double(), wanted, rtol=1e-4, atol=1e-4)
        column += count


def test_ties_go_to_the_lowest_and_nan_to_the_first() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [math.nan, 0.0]]])
    centroids = torch.tensor([[[0.0, -1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    assert assign(x, centroids).tolist() == [[2, 1, 0, 0]]
    centroids[0, 3] = math.nan
    assert assign(x, centroids).tolist() == [[3, 3, 3, 0]]


@pytest.mark.parametrize("spec", [SPEC, SPEC._replace(global_pass=True, iterations=10), SPEC._replace(segment=128)])
def test_the_objective_is_the_references(spec: Spec) -> None:
    k = rows([256], kv_heads=2, d=16).k[0].float()
    labels = portable.kmeans(k, plan(spec, [(0, 0, 256)], [0]), spec)
    for g in range(2):
        x = k[:, g].double() - k[:, g].double().mean(0)
        mine, theirs = (
            reference.total(x, chosen.long(), 64).norm(dim=1).sum()
            for chosen in (labels[g], reference.segmented_kmeans(k[:, g], options(spec))[0])
        )
        assert abs(mine / theirs - 1) < 1e-3


@pytest.mark.parametrize("spec", [SPEC, SPEC._replace(max_cluster=4), SPEC._replace(tokens_per_cluster=1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_store_holds_what_the_labels_say(spec: Spec, dtype: torch.dtype) -> None:
    x = rows(LENGTHS, dtype=dtype)
    store = build(x, spec)
    eps = torch.finfo(dtype).eps
    for b, n in enumerate(LENGTHS):
        index = index_of(x, store, b, spec)
        count, indexed = index.sizes.shape[1], max(0, n - 7)
        assert (int(store.clusters[b]), int(store.indexed[b]), int(store.lengths[b])) == (count, indexed, n)
        assert torch.equal(store.sizes[b, :, :count], index.sizes)
        assert (store.offsets[b, :, count:] == indexed).all()
        order = index.members()
        assert torch.equal(store.tokens[b, :, :indexed].long(), order + spec.sink)
        for held, given in ((store.k, x.k[b]), (store.v, x.v[b])):
            wanted = (
                given[spec.sink : spec.sink + indexed].transpose(0, 1).gather(1, order[..., None].expand(-1, -1, 16))
            )
            assert torch.equal(held[b, :, :indexed], wanted)
        live = index.sizes > 0
        for name, wanted in (
            ("centroids", index.centroids),
            ("value_sums", index.value_sums),
            ("radius", index.radius),
        ):
            got = getattr(store, name)[b, :, :count].to(wanted.dtype)
            torch.testing.assert_close(got[live], wanted[live], rtol=8 * eps, atol=16 * eps, msg=name)
        assert store.centroids[b].isfinite().all()


def test_replayed_labels_win() -> None:
    x = rows([60])
    labels = torch.full((2, 60), -1, dtype=torch.int32)
    labels[:, 2:55] = torch.randint(0, 14, (2, 53), generator=torch.Generator().manual_seed(3))
    store = build(x, labels=labels)
    assert torch.equal(labels_of(store, 0), labels[:, 2:55].long())


def test_growing_leaves_older_clusters_alone() -> None:
    x = rows([90, 90])
    start = Rows(x.q, [x.k[0][:61], x.k[1][:40]], [x.v[0][:61], x.v[1][:40]])
    store = build(start, room=60)
    before = Store(*(t.clone() for t in store))
    indices = [index_of(start, store, b) for b in range(2)]
    for t in range(29):
        at = [61 + t, 40 + t]
        token = (torch.stack([y[b][n] for b, n in enumerate(at)]) for y in (x.k, x.v))
        portable.push(store, *token, SPEC)
        due = [b for b, n in enumerate(store.lengths.tolist()) if n - 7 - int(store.indexed[b]) == 12]
        if due:
            assert due == [0, 1]
            k, v = portable.waiting(store, due, 12, SPEC)
            for i, b in enumerate(due):
                first = 2 + int(store.indexed[b])
                assert torch.equal(k[12 * i : 12 * i + 12], x.k[b][first : first + 12])
                assert torch.equal(v[12 * i : 12 * i + 12], x.v[b][first : first + 12])
            call = plan(SPEC, [(b, 12 * i, 12 * i + 12) for i, b in enumerate(due)], store.clusters.tolist())
            portable.extend(store, k, v, call, SPEC)
            for b in due:
                n = int(store.lengths[b])
                fresh = labels_of(store, b)[:, indices[b].indexed :] - indices[b].sizes.shape[1]
                indices[b] = reference.extend_index(indices[b], x.k[b][:n], x.v[b][:n], options(SPEC), fresh)
    assert store.indexed.tolist() == [54 + 24, 33 + 24]
    for b in range(2):
        for names, n in (("centroids value_means radius", before.clusters[b]), ("tokens k v", before.indexed[b])):
            for name in names.split():
                assert torch.equal(getattr(store, name)[b, :, :n], getattr(before, name)[b, :, :n])
    now = Rows(x.q, [x.k[0], x.k[1][:69]], [x.v[0], x.v[1][:69]])
    got = ask(now, store)
    for b, index in enumerate(indices):
        wanted = reference.wave_attention(
            x.q[b], now.k[b], now.v[b], index, options(SPEC), scale=0.25, retrieval_ratio=0.1, estimation_ratio=0.3
        )
        torch.testing.assert_close(got.out[b], wanted.out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got.upper[b], wanted.upper, rtol=1e-10, atol=1e-10)
