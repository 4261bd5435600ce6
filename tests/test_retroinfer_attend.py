"""A decode step of RetroInfer's portable backend against the reference, row by row."""

import math

import pytest
import torch
from torch import Tensor

from attnlab.kernels.retroinfer import portable
from attnlab.kernels.retroinfer.spec import Attended, Spec, Store, part
from tests.wave_oracle import dense
from tests.wave_stores import LENGTHS, QUERY, SPEC, Rows, answers, ask, build, check, labels_of, planted, rows


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
