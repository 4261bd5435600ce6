"""RetroInfer's portable backend against the reference, row by row."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from attnlab.kernels.retroinfer import portable
from attnlab.kernels.retroinfer.portable_kmeans import assign
from attnlab.kernels.retroinfer.spec import Attended, Query, Spec, Store, allocate, budget, part, places, plan
from attnlab.reference import retroinfer as reference
from attnlab.testing import gaussian
from tests.wave_oracle import dense

SPEC = Spec(2, 5, 40, 4, 4, False, 0, 12)
LENGTHS = [131, 7, 64, 1, 0, 48]  # several segments, all steady, two segments, ... and a short last one
QUERY = Query(0.25, "sum", False, "ratio", 0, 0.0, True)


class Rows(NamedTuple):
    q: Tensor  # [B, Hq, D]
    k: list[Tensor]  # per row, [t, G, D]
    v: list[Tensor]


def options(spec: Spec) -> reference.Options:
    final = "global" if spec.global_pass else "segment"
    sizes = spec.sink, spec.local, spec.segment, spec.tokens_per_cluster, spec.iterations
    return reference.Options(*sizes, final, spec.max_cluster or None, spec.update_every)


def rows(
    lengths: list[int], group: int = 2, kv_heads: int = 2, d: int = 16, dtype=torch.float64, seed: int = 0
) -> Rows:
    x = gaussian(len(lengths), 1, max(lengths), group * kv_heads, kv_heads, d, dtype=dtype, seed=seed, scale=1.5)
    return Rows(x.q[:, 0], *([y[b, :n] for b, n in enumerate(lengths)] for y in (x.k, x.v)))


def build(x: Rows, spec: Spec = SPEC, room: int = 0, labels: Tensor | None = None) -> Store:
    """The store of whole rows, clustered in one call over a ragged source."""
    lengths = [len(k) for k in x.k]
    store = allocate(len(lengths), x.k[0].shape[1], x.q.shape[2], max(lengths) + room, spec, x.q.dtype, "cpu")
    ranges, at = [], 0
    for b, n in enumerate(lengths):
        ranges.append((b, at + min(n, spec.sink), at + max(min(n, spec.sink), n - spec.local)))
        at += n
    k, v = torch.cat(x.k), torch.cat(x.v)
    portable.extend(store, k, v, plan(spec, ranges, [0] * len(lengths)), spec, labels)
    store.lengths.copy_(torch.tensor(lengths))
    for b, (k, v) in enumerate(zip(x.k, x.v, strict=True)):
        t = torch.arange(len(k))
        kept = t[(t < spec.sink) | (t >= spec.sink + store.indexed[b])]
        store.k_steady[b, :, places(kept, spec)] = k[kept].transpose(0, 1)
        store.v_steady[b, :, places(kept, spec)] = v[kept].transpose(0, 1)
    return store


def labels_of(store: Store, b: int, spec: Spec = SPEC) -> Tensor:
    """The slot of each indexed token of a row, `[G, indexed]`."""
    n = int(store.indexed[b])
    slots = torch.arange(store.radius.shape[2])
    found = torch.full((store.k.shape[1], n), -1)
    for g, sizes in enumerate(store.sizes[b].long()):
        found[g, store.tokens[b, g, :n].long() - spec.sink] = slots.repeat_interleave(sizes)
    return found


def index_of(x: Rows, store: Store, b: int, spec: Spec = SPEC) -> reference.Index:
    """The reference's index of a row with the same grouping."""
    return reference.build_index(x.k[b], x.v[b], options(spec), labels_of(store, b, spec))


def ask(x: Rows, store: Store, query: Query = QUERY, ratios=(0.1, 0.3), spec: Spec = SPEC, chosen=None) -> Attended:
    clusters = store.clusters.tolist()
    store.budgets.copy_(torch.tensor([budget(*ratios, query.estimation, n) for n in clusters]))
    most = max(clusters)
    width = most if query.max_error or chosen is not None else part(ratios[0], most)
    return portable.attend(x.q, store, query._replace(k_slots=width), spec, chosen)


def answers(
    x: Rows, store: Store, query: Query = QUERY, ratios=(0.1, 0.3), spec: Spec = SPEC
) -> list[reference.Result]:
    return [
        reference.wave_attention(
            x.q[b], x.k[b], x.v[b], index_of(x, store, b, spec), options(spec), scale=query.scale,
            retrieval_ratio=ratios[0], estimation_ratio=ratios[1], estimation=query.estimation,
            group_reduce=query.reduce, weight_by_size=query.weight_by_size, max_error=query.max_error or None,
        )
        for b in range(len(x.k))
    ]  # fmt: skip


def chosen_mask(got: Attended, b: int, count: int) -> Tensor:
    mask = torch.zeros(got.chosen.shape[1], count + 1, dtype=torch.bool)
    return mask.scatter_(1, got.chosen[b].long() % (count + 1), True)[:, :count]  # -1 falls in the last column


def check(x: Rows, got: Attended, wanted: list[reference.Result], atol: float) -> None:
    for b, result in enumerate(wanted):
        assert torch.equal(chosen_mask(got, b, result.retrieved.shape[1]), result.retrieved)
        for name in ("out", "lse", "lower", "upper"):
            torch.testing.assert_close(getattr(got, name)[b], getattr(result, name), rtol=atol, atol=atol, msg=name)
        chosen = got.chosen[b]
        head = [c[c >= 0] for c in chosen]
        assert all((c.diff() > 0).all() and (row[len(c) :] == -1).all() for c, row in zip(head, chosen, strict=True))


def planted(tokens: int, width: int, d: int = 16, seed: int = 0) -> Tensor:
    """Keys `[tokens, 2, d]` in runs of `width` near well separated directions, so that no rounding moves a label."""
    g = torch.Generator().manual_seed(seed)
    near = torch.linalg.qr(torch.randn(2, d, d, generator=g, dtype=torch.float64)).Q
    run = torch.arange(tokens) // width % d
    return 5 * near[:, run].transpose(0, 1) + 0.02 * torch.randn(tokens, 2, d, generator=g, dtype=torch.float64)


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
    before = [t.clone() for t in store]
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
        count, held = int(before[-2][b]), int(before[-3][b])
        for i in (0, 1, 2):
            assert torch.equal(store[i][b, :, :count], before[i][b, :, :count])
        for i in (4, 5, 6):
            assert torch.equal(store[i][b, :, :held], before[i][b, :, :held])
    now = Rows(x.q, [x.k[0], x.k[1][:69]], [x.v[0], x.v[1][:69]])
    got = ask(now, store)
    for b, index in enumerate(indices):
        wanted = reference.wave_attention(
            x.q[b], now.k[b], now.v[b], index, options(SPEC), scale=0.25, retrieval_ratio=0.1, estimation_ratio=0.3
        )
        torch.testing.assert_close(got.out[b], wanted.out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got.upper[b], wanted.upper, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("d", [32, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_ragged_rows_in_float64(group: int, d: int) -> None:
    x = rows(LENGTHS, group=group, d=d)
    store, query = build(x), QUERY._replace(scale=-0.5 if d == 80 else d**-0.5)
    check(x, ask(x, store, query), answers(x, store, query), 1e-10)


@pytest.mark.parametrize("estimation", ["ratio", "all", "none"])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("weight", [False, True])
def test_options(estimation: str, reduce: str, weight: bool) -> None:
    x = rows(LENGTHS, group=4, d=32)
    store = build(x, SPEC._replace(max_cluster=4))
    query = QUERY._replace(estimation=estimation, reduce=reduce, weight_by_size=weight)
    spec = SPEC._replace(max_cluster=4)
    for ratios in ((0.1, 0.3), (0.0, 0.25), (0.5, 1.0), (1.0, 0.5), (0.0, 0.0)):
        check(x, ask(x, store, query, ratios), answers(x, store, query, ratios, spec), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_smaller_types(dtype: torch.dtype) -> None:
    x = rows(LENGTHS, group=4, d=64, dtype=dtype)
    store, query = build(x), QUERY._replace(scale=0.125)
    got, eps = ask(x, store, query), torch.finfo(dtype).eps
    wide = Rows(x.q.double(), [k.double() for k in x.k], [v.double() for v in x.v])
    exact = store._replace(
        centroids=store.centroids.double(), value_means=store.value_means.double(), k=store.k.double(),
        v=store.v.double(), k_steady=store.k_steady.double(), v_steady=store.v_steady.double(),
    )  # fmt: skip
    wanted = portable.attend(wide.q, exact, query._replace(k_slots=got.chosen.shape[2]), SPEC, got.chosen)
    close = max(4 * eps, 5e-6)  # in float32 a logit of 20 is known to 2e-6, and so is its weight
    torch.testing.assert_close(got.out.double(), wanted.out, rtol=close, atol=close)
    torch.testing.assert_close(got.lse.double(), wanted.lse, rtol=1e-5, atol=1e-5)
    assert got.out.dtype == dtype and got.lse.dtype == torch.float32
    for b in range(len(LENGTHS)):  # the bounds hold for the true keys although centroids are rounded
        true = unread_share(wide, store, got, b, 0.125)
        assert (got.lower[b] <= true + 1e-5).all() and (true <= got.upper[b] + 1e-5).all()
        if dtype == torch.float32:
            check(x, got, answers(x, store, query), 2e-5)


def unread_share(x: Rows, store: Store, got: Attended, b: int, scale: float) -> Tensor:
    """The share of the attention mass of a row's tokens that its step did not read, `[Hq]`."""
    group, n = x.q.shape[1] // store.k.shape[1], len(x.k[b])
    if not n:
        return torch.zeros(x.q.shape[1], dtype=torch.float64)
    weights = torch.einsum("hd,thd->ht", x.q[b], x.k[b].repeat_interleave(group, 1)).mul(scale).softmax(-1)
    labels = labels_of(store, b)
    unread = torch.zeros(store.k.shape[1], n, dtype=torch.bool)
    for g, row in enumerate(labels):
        unread[g, 2 : 2 + len(row)] = ~torch.isin(row, got.chosen[b, g].long())
    return (weights * unread.repeat_interleave(group, 0)).sum(-1)


@pytest.mark.parametrize("max_error", [0.5, 0.1, 0.01, 1e-9])
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("tight", [True, False])
def test_adaptive_budget(max_error: float, reduce: str, tight: bool) -> None:
    """In tight clusters the bound means something; around random keys only reading everything will do."""
    x = rows(LENGTHS, group=2)
    x = x._replace(k=[planted(n, 4) for n in LENGTHS]) if tight else x
    store, query = build(x), QUERY._replace(max_error=max_error, reduce=reduce, scale=0.5)
    got = ask(x, store, query, (0.05, 0.3))
    check(x, got, answers(x, store, query, (0.05, 0.3)), 1e-10)
    assert (got.upper <= max_error * (1 + 1e-9)).all()
    if tight and max_error in (0.1, 0.01):
        first, second = (got.chosen[0] >= 0).sum(-1).tolist()
        assert first != second and part(0.05, 32) < min(first, second) < (store.sizes[0, 0] > 0).sum()


@pytest.mark.parametrize("ratios", [(1.0, 0.0), (0.0, 1.0)])
def test_everything_is_full_attention(ratios: tuple[float, float]) -> None:
    """All retrieved, or all estimated where clusters are single tokens."""
    spec = SPEC._replace(tokens_per_cluster=1)
    x = rows([60, 23], d=8)
    store = build(x, spec)
    if ratios[1]:
        for b in range(2):
            assert (store.sizes[b].max(), store.radius[b].max()) == (1, 0)
    got = ask(x, store, QUERY._replace(scale=8**-0.5), ratios, spec)
    for b in range(2):
        for mine, true in zip(got[:2], dense(x.q[b], x.k[b], x.v[b]), strict=True):
            torch.testing.assert_close(mine[b], true, rtol=1e-10, atol=1e-10)


def test_a_chosen_zone_is_replayed() -> None:
    x = rows(LENGTHS)
    store = build(x)
    first = ask(x, store)
    again = ask(x, store, chosen=first.chosen)
    for name in ("out", "lse", "lower", "upper"):
        torch.testing.assert_close(getattr(again, name), getattr(first, name), rtol=1e-12, atol=1e-12)
    assert torch.equal(again.chosen[..., : first.chosen.shape[2]], first.chosen)
    shifted = torch.where(first.chosen >= 0, (first.chosen + 1) % 4, -1)
    assert not torch.equal(ask(x, store, chosen=shifted).lse[0], first.lse[0])


def test_empty_index() -> None:
    x = rows([5, 0, 7])
    got = ask(x, build(x))
    assert got.chosen.shape == (3, 2, 0)
    for b in (0, 2):
        torch.testing.assert_close(
            got.out[b], dense(x.q[b], x.k[b], x.v[b])[0] if b else got.out[0], rtol=1e-10, atol=0
        )
    check(x, got, answers(x, build(x)), 1e-10)
    assert (got.out[1] == 0).all() and (got.lse[1] == -math.inf).all()
    assert (got.lower == 0).all() and (got.upper == 0).all()


def test_no_exact_keys_at_all() -> None:
    spec = SPEC._replace(sink=0, local=0)
    x = rows([48])
    got = ask(x, build(x, spec), QUERY._replace(estimation="all"), (0.0, 0.0), spec)
    assert (got.lower == 1).all() and (got.upper == 1).all()
    check(x, got, answers(x, build(x, spec), QUERY._replace(estimation="all"), (0.0, 0.0), spec), 1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_shows_where_it_should(bad: float) -> None:
    x = rows([131, 64], group=2)
    store = build(x)
    clean = ask(x, store)
    unread = next(c for c in range(int(store.clusters[0])) if store.sizes[0, 0, c] > 1 and c not in clean.chosen[0, 0])
    for name in ("centroids", "k"):  # a key that is not finite makes its centroid so
        at = unread if name == "centroids" else store.offsets[0, 0, unread]
        getattr(store, name)[0, 0, at] = bad
    got = ask(x, store)
    assert got.out[0, :2].isnan().all() and got.lse[0, :2].isnan().all()
    assert torch.equal(got.out[0, 2:], clean.out[0, 2:]) and torch.equal(got.out[1], clean.out[1])
    query = x.q.clone()
    query[1, 3, 2] = bad
    got = ask(x._replace(q=query), build(x))
    assert got.out[1, 3].isnan().all()
    torch.testing.assert_close(got.out[1, :2], clean.out[1, :2], rtol=1e-12, atol=1e-12)


def test_values_that_are_not_read_never_count() -> None:
    x = rows([131, 64])
    store = build(x)
    clean = ask(x, store, ratios=(0.1, 0.2))
    result = answers(x, store, ratios=(0.1, 0.2))
    for b in range(2):
        touched = result[b].retrieved | result[b].estimated
        for g in range(2):
            store.value_means[b, g, : touched.shape[1]][~result[b].estimated[g]] = math.nan
            read = torch.isin(labels_of(store, b)[g], result[b].retrieved[g].nonzero()[:, 0])
            store.v[b, g, : len(read)][~read[store.tokens[b, g, : len(read)].long() - 2]] = math.nan
    store.v_steady[0, :, 2 + (131 - 2) % 17] = math.nan  # places that hold no token
    store.k_steady[0, :, 2 + (131 - 2) % 17] = math.nan
    assert torch.equal(ask(x, store, ratios=(0.1, 0.2)).out, clean.out)


def test_reruns_are_bitwise_equal() -> None:
    x = rows([400, 333], group=4, d=32, dtype=torch.float32)
    spec = Spec(2, 5, 200, 4, 6, True, 8, 12)
    first, second = build(x, spec), build(x, spec)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    query = QUERY._replace(max_error=0.2)
    assert all(
        torch.equal(a, b) for a, b in zip(ask(x, first, query, spec=spec), ask(x, first, query, spec=spec), strict=True)
    )


def test_strides_do_not_matter() -> None:
    x = rows([90])
    k = x.k[0].transpose(0, 1).contiguous().transpose(0, 1)
    v = torch.stack([x.v[0], x.v[0] + 1], 1)[:, 0]
    a, b = build(x), build(x._replace(k=[k], v=[v]))
    assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))


def test_empty_slots_are_never_chosen_in_float32() -> None:
    spec = SPEC._replace(max_cluster=4)
    x = rows(LENGTHS, dtype=torch.float32)
    store = build(x, spec)
    assert (store.sizes[0, :, : int(store.clusters[0])] == 0).any()
    check(x, ask(x, store, ratios=(1.0, 0.0), spec=spec), answers(x, store, ratios=(1.0, 0.0), spec=spec), 2e-5)
