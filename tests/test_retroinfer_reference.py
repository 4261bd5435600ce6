"""RetroInfer's decode step against loops, full attention, and its own bounds."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.reference import retroinfer as wave
from attnlab.reference.states import merge_states
from attnlab.testing import Inputs
from tests.wave_oracle import CLOSE, SMALL, dense, row

SELECTORS = ("full", "oracle", "quest", "cluster", "wave")


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("d", [32, 64, 80, 128])
@pytest.mark.parametrize("tokens", [0, 1, 3, 68, 69, 150])
def test_all_clusters_retrieved_is_full_attention(group, d, tokens):
    q, k, v = row(tokens, group, 2, d)
    options = wave.Options(segment=48, iterations=3)
    index = wave.build_index(k, v, options)
    result = wave.wave_attention(q, k, v, index, options, retrieval_ratio=1.0)
    out, lse = dense(q, k, v)
    torch.testing.assert_close(result.out, out, **CLOSE)
    torch.testing.assert_close(result.lse, lse, **CLOSE)
    assert (result.upper == 0).all() and not result.estimated.any()


@pytest.mark.parametrize("group", [1, 2, 4])
def test_singletons_estimated_is_full_attention(group):
    q, k, v = row(50, group)
    options = SMALL._replace(tokens_per_cluster=1, iterations=1)
    index = wave.build_index(k, v, options)
    assert (index.sizes == 1).all()
    result = wave.wave_attention(q, k, v, index, options, retrieval_ratio=0.0, estimation="all")
    assert result.estimated.all() and not result.retrieved.any()
    out, lse = dense(q, k, v)
    torch.testing.assert_close(result.out, out, **CLOSE)
    torch.testing.assert_close(result.lse, lse, **CLOSE)
    torch.testing.assert_close(result.lower, result.upper, **CLOSE)


def loops(q, k, v, index, options, retrieval_ratio, estimation_ratio, estimation, group_reduce, weight_by_size):
    """One decode step one head and token at a time."""
    kv_heads, count, scale = k.shape[1], index.sizes.shape[1], 1 / math.sqrt(q.shape[1])
    group, out, lse = len(q) // kv_heads, torch.zeros_like(q), []
    take = [0 if not x else min(count, max(1, int(x * count + 0.5))) for x in (retrieval_ratio, estimation_ratio)]
    take[1] = {"ratio": take[1], "all": count, "none": 0}[estimation]
    for g in range(kv_heads):
        filled = [c for c in range(count) if index.sizes[g, c]]
        share = {c: [] for c in filled}
        for h in range(g * group, (g + 1) * group):
            weight = {c: math.exp(float(q[h] @ index.centroids[g, c]) * scale) for c in filled}
            if weight_by_size:
                weight = {c: w * int(index.sizes[g, c]) for c, w in weight.items()}
            for c in filled:
                share[c].append(weight[c] / sum(weight.values()))
        together = {"sum": sum, "max": max, "mean": lambda x: sum(x) / len(x)}[group_reduce]
        ranked = sorted(filled, key=lambda c: -together(share[c]))
        read, guessed = ranked[: take[0]], ranked[take[0] : take[0] + take[1]]
        tokens = [t for t in range(len(k)) if t < options.sink or t >= options.sink + index.indexed]
        tokens += [t + options.sink for t in range(index.indexed) if int(index.labels[g, t]) in read]
        for h in range(g * group, (g + 1) * group):
            top, bottom = torch.zeros_like(q[0]), 0.0
            for t in tokens:
                e = math.exp(float(q[h] @ k[t, g]) * scale)
                top, bottom = top + e * v[t, g], bottom + e
            for c in guessed:
                e = math.exp(float(q[h] @ index.centroids[g, c]) * scale)
                top, bottom = top + e * index.value_sums[g, c], bottom + e * int(index.sizes[g, c])
            out[h] = top / bottom
            lse.append(math.log(bottom))
    return out, torch.tensor(lse, dtype=torch.float64)


@pytest.mark.parametrize("group_reduce", ["sum", "max", "mean"])
@pytest.mark.parametrize("weight_by_size", [False, True])
@pytest.mark.parametrize("estimation", ["ratio", "all", "none"])
@pytest.mark.parametrize("group", [1, 4])
def test_decode_equals_loops(group_reduce, weight_by_size, estimation, group):
    q, k, v = row(110, group, scale=1.5)
    index = wave.build_index(k, v, SMALL)
    options = dict(retrieval_ratio=0.1, estimation_ratio=0.3, estimation=estimation)
    options |= dict(group_reduce=group_reduce, weight_by_size=weight_by_size)
    result = wave.wave_attention(q, k, v, index, SMALL, **options)
    out, lse = loops(q, k, v, index, SMALL, **options)
    torch.testing.assert_close(result.out, out, **CLOSE)
    torch.testing.assert_close(result.lse, lse, **CLOSE)


def test_ranking_by_hand():
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.01, 0.25, 0.74]])
    everyone = torch.ones(1, 3, dtype=torch.bool)
    orders = {how: wave.rank(shares.log(), everyone, 1, how).tolist() for how in ("sum", "mean", "max")}
    assert orders == {"sum": [[2, 1, 0]], "mean": [[2, 1, 0]], "max": [[2, 0, 1]]}
    shares[:, 0], shares[0, 1] = 0, math.nan
    assert wave.rank(shares.log(), torch.tensor([[False, True, True]]), 1, "sum").tolist() == [[1, 2, 0]]
    shares = torch.tensor([[0.6, 0.4], [0.3, 0.7]])
    assert wave.rank(shares.log(), torch.ones(2, 2, dtype=torch.bool), 2, "sum").tolist() == [[0, 1], [1, 0]]
    ties = torch.tensor([[-0.0, 1.0, 0.0, -0.0]])
    assert wave.rank(ties, torch.ones(1, 4, dtype=torch.bool), 1, "max").tolist() == [[1, 0, 2, 3]]


def test_weight_by_size_prefers_the_large():
    options = wave.Options(sink=0, local=0, tokens_per_cluster=4)
    k = torch.tensor([1.0, 1, 1, 1, 1, 1.1]).double()[:, None, None]
    index = wave.build_index(k, k, options, labels=torch.tensor([[0, 0, 0, 0, 0, 1]]))
    for weighted, winner in ((False, 1), (True, 0)):
        result = wave.wave_attention(k[0], k, k, index, options, weight_by_size=weighted)
        assert result.retrieved[0].nonzero().tolist() == [[winner]]


def test_far_clusters_keep_their_order():
    # In float32 the probabilities of all but the first cluster are 0; their logarithms still rank.
    options = wave.Options(sink=0, local=0, tokens_per_cluster=1, iterations=1)
    k = torch.tensor([3.0, 1.0, 2.0, 4.0])[:, None, None] * torch.eye(2)[0]
    index = wave.build_index(k, k, options, labels=torch.arange(4)[None])
    result = wave.wave_attention(torch.tensor([[300.0, 0], [300.0, 0]]), k, k, index, options, retrieval_ratio=0.5)
    assert result.retrieved.tolist() == [[True, False, False, True]]
    assert result.estimated.tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(
    ("ratio", "count", "expected"),
    [(0.0, 100, 0), (0.018, 8192, 147), (0.232, 8192, 1901), (0.001, 5, 1), (0.5, 5, 3), (1.0, 7, 7), (0.3, 0, 0)],
)
def test_rounding_of_ratios(ratio, count, expected):
    assert wave.part(ratio, count) == expected


def test_merge_order_does_not_matter():
    q, k, v = row(110, 2)
    index = wave.build_index(k, v, SMALL)
    result = wave.wave_attention(q, k, v, index, SMALL, retrieval_ratio=0.2)
    zones = wave.zone_states(q, k, v, index, SMALL, result.retrieved.gather(1, index.labels), result.estimated, 8**-0.5)
    assert zones[1].isfinite().all()
    for order in itertools.permutations(range(3)):
        out, lse = merge_states(*(x[list(order)] for x in zones))
        torch.testing.assert_close(out, result.out, **CLOSE)
        torch.testing.assert_close(lse, result.lse, **CLOSE)


def test_rows_of_their_own_lengths():
    # Keys and values are only read where the row is: what lies behind it may be anything.
    q, k, v = row(40, 2)
    index = wave.build_index(k, v, SMALL)
    result = wave.wave_attention(q, k, v, index, SMALL, retrieval_ratio=0.2, estimation="none")
    unread = ~(result.retrieved.gather(1, index.labels))
    v = v.clone()
    v[2 : 2 + index.indexed][unread.T] = math.nan
    again = wave.wave_attention(q, k, v, index, SMALL, retrieval_ratio=0.2, estimation="none")
    assert torch.equal(again.out, result.out)


@pytest.mark.parametrize("where", ["key", "query"])
def test_nan_shows(where):
    q, k, v = row(110, 2)
    (k[50, 1] if where == "key" else q[2])[3] = math.nan
    index = wave.build_index(k, v, SMALL)
    result = wave.wave_attention(q, k, v, index, SMALL, estimation="none")
    assert result.out.isnan().all(1).tolist() == [False, False, True, where == "key"]
    assert torch.equal(result.lse.isnan(), result.out.isnan().all(1))
    if where == "key":  # the mean is NaN, so each segment's tokens stay together
        assert index.sizes[1].nonzero()[:, 0].tolist() == [0, 10, 20] and int(index.sizes[1].sum()) == 103


def adversarial(kind: str, tokens: int, seed: int) -> Inputs:
    q, k, v = row(tokens, 2, d=4, seed=seed)
    if kind == "aligned":  # keys on the query's line, far apart: Jensen's bound is at its worst
        k = torch.linspace(-8, 8, tokens, dtype=torch.float64)[:, None, None] * q[::2]
    elif kind == "orthogonal":  # the radius says nothing about the scores
        k = k - (k * q[::2]).sum(-1, keepdim=True) * q[::2] / (q[::2] ** 2).sum(-1, keepdim=True)
    elif kind == "outlier":
        k = k * 0.01
        k[tokens // 2] = 20 * q[::2] / q[::2].norm(dim=-1, keepdim=True)
    elif kind == "copies":
        k = k[:3].repeat(tokens // 3 + 1, 1, 1)[:tokens]
    return Inputs(q, k.contiguous(), v)


@given(
    kind=st.sampled_from(["random", "aligned", "orthogonal", "outlier", "copies"]),
    seed=st.integers(0, 1000),
    grouping=st.sampled_from(["kmeans", "random", "one"]),
    scale=st.sampled_from([0.5, -0.7, 3.0]),
    estimation=st.sampled_from(["ratio", "all", "none"]),
)
def test_bounds_hold(kind, seed, grouping, scale, estimation):
    q, k, v = adversarial(kind, 60, seed)
    g = torch.Generator().manual_seed(seed)
    labels = {"kmeans": None, "one": torch.zeros(2, 53).long(), "random": torch.randint(9, (2, 53), generator=g)}
    index = wave.build_index(k, v, SMALL, labels[grouping])
    _, low, high = wave.cluster_logits(q, index, scale)
    logits = torch.einsum("hd,thd->ht", q, k.repeat_interleave(2, 1)) * scale
    members = index.labels.repeat_interleave(2, 0)
    for c in range(index.sizes.shape[1]):
        true = logits[:, 2:55].masked_fill(members != c, -math.inf).logsumexp(-1)
        assert (true >= low[:, c] - 1e-9).all() and (true <= high[:, c] + 1e-9).all()
    result = wave.wave_attention(q, k, v, index, SMALL, scale=scale, retrieval_ratio=0.2, estimation=estimation)
    unread = ~result.retrieved.gather(1, index.labels).repeat_interleave(2, 0)
    share = (logits[:, 2:55].masked_fill(~unread, -math.inf).logsumexp(-1) - logits.logsumexp(-1)).exp()
    assert (share >= result.lower - 1e-9).all() and (share <= result.upper + 1e-9).all()


@pytest.mark.parametrize("max_error", [0.5, 0.2, 0.01])
def test_adaptive_budget_reads_as_little_as_its_bound_allows(max_error):
    q, k, v = row(200, 2, scale=1.5)
    index = wave.build_index(k, v, SMALL)
    options = dict(retrieval_ratio=0.05, estimation="none")
    result = wave.wave_attention(q, k, v, index, SMALL, **options, max_error=max_error)
    counts = result.retrieved.sum(1)
    assert (result.upper <= max_error).all() and (counts < index.sizes.shape[1]).any()
    steady = wave.steady_zone(200, index, SMALL)
    for g in range(2):
        heads, keys = slice(2 * g, 2 * g + 2), k[:, g]
        exp = (q[heads] @ index.centroids[g].T / math.sqrt(8)).exp()
        slack = (q[heads].norm(dim=-1, keepdim=True) * index.radius[g] / math.sqrt(8)).exp()
        base = (q[heads] @ keys[steady].T / math.sqrt(8)).exp().sum(1)
        order = sorted(range(len(exp[0])), key=lambda c: -float((exp / exp.sum(1, keepdim=True))[:, c].sum()))
        for count in range(wave.part(0.05, len(order)), len(order) + 1):
            taken, left = order[:count], order[count:]
            most = (exp * slack * index.sizes[g])[:, left].sum(1)
            if bool((most <= max_error * (base + (exp * index.sizes[g])[:, taken].sum(1) + most)).all()):
                break
        assert int(counts[g]) == count
    plain = wave.wave_attention(q, k, v, index, SMALL, **options)
    assert (plain.upper > max_error).any()
    everything = wave.wave_attention(q, k, v, index, SMALL, **(options | dict(retrieval_ratio=1.0)), max_error=0.5)
    assert everything.retrieved.all()


def test_a_nan_head_does_not_cost_its_group_the_bound():
    q, k, v = row(200, 2, scale=1.5)
    q[0, 0] = math.nan
    index = wave.build_index(k, v, SMALL)
    result = wave.wave_attention(q, k, v, index, SMALL, max_error=0.2)
    assert result.out.isnan().any(1).tolist() == [True, False, False, False]
    assert (result.upper[1:] <= 0.2).all() and result.retrieved[0].all() and not result.retrieved[1].all()


def test_nothing_read_exactly():
    q, k, v = row(40, 2)
    options = SMALL._replace(sink=0, local=0)
    index = wave.build_index(k, v, options)
    result = wave.wave_attention(q, k, v, index, options, retrieval_ratio=0.0, estimation="none")
    assert (result.out == 0).all() and (result.lse == -math.inf).all()
    assert (result.lower == 1).all() and (result.upper == 1).all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("tokens, group", [(5, 1), (7, 2), (8, 2), (100, 1), (101, 4)])
def test_selectors_at_the_full_budget_are_full_attention(selector, tokens, group):
    q, k, v = row(tokens, group)
    index = wave.build_index(k, v, SMALL)
    out, lse, read = wave.select_attention(q, k, v, index, SMALL, selector=selector, budget=1.0)
    assert read.all()
    for got, want in zip((out, lse), dense(q, k, v), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("budget", [0.01, 0.1, 0.3])
def test_selectors_read_whole_units_within_one_budget(selector, budget):
    q, k, v = row(207, 2, scale=1.5)
    index = wave.build_index(k, v, SMALL)
    out, _, read = wave.select_attention(q, k, v, index, SMALL, selector=selector, budget=budget, page=10)
    steady = wave.steady_zone(207, index, SMALL)
    assert read[:, steady].all()
    chosen, room = read[:, ~steady], math.floor(budget * 207 + 0.5)
    if selector == "full":
        assert chosen.all()
        return
    unit = {"oracle": torch.arange(200).expand(2, -1), "quest": torch.arange(200).expand(2, -1) // 10}
    unit = unit.get(selector, index.labels)
    for g in range(2):
        units = unit[g][chosen[g]].unique()
        assert torch.equal(torch.isin(unit[g], units), chosen[g])
        assert len(units) == 1 or int(chosen[g].sum()) <= room
        if selector == "oracle":
            share = torch.einsum("hd,td->ht", q[2 * g : 2 * g + 2], k[~steady, g]).div(math.sqrt(8)).softmax(-1).sum(0)
            assert set(share.topk(max(1, room)).indices.tolist()) == set(chosen[g].nonzero()[:, 0].tolist())
        if selector == "quest":
            pages = k[~steady, g].reshape(20, 10, 8)
            ends = torch.maximum(q[2 * g : 2 * g + 2, None] * pages.amin(1), q[2 * g : 2 * g + 2, None] * pages.amax(1))
            score = ends.sum(-1).div(math.sqrt(8)).softmax(-1).sum(0)
            assert set(score.topk(max(1, room // 10)).indices.tolist()) == set(units.tolist())
    if selector in ("cluster", "wave"):
        ratio = wave.select_attention(q, k, v, index, SMALL, selector="cluster", budget=budget)
        assert torch.equal(ratio[2], read) and torch.equal(ratio[0], out) == (selector == "cluster")


def test_estimation_helps_where_keys_cluster():
    g = torch.Generator().manual_seed(0)
    centre, mean = (torch.randn(32, 1, 16, generator=g, dtype=torch.float64) for _ in range(2))
    noise = torch.randn(2, 512, 1, 16, generator=g, dtype=torch.float64)
    k, v = 2 * centre.repeat_interleave(16, 0) + 0.2 * noise[0], mean.repeat_interleave(16, 0) + 0.2 * noise[1]
    q = 2 * torch.randn(4, 16, generator=g, dtype=torch.float64)
    options = wave.Options(sink=0, local=0)
    index = wave.build_index(k, v, options)
    error = {}
    for estimation in ("none", "ratio", "all"):
        result = wave.wave_attention(q, k, v, index, options, retrieval_ratio=0.05, estimation=estimation)
        error[estimation] = float((result.out - dense(q, k, v)[0]).norm())
    assert error["all"] < error["ratio"] / 2 < error["none"] / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_accumulate_in_float32(dtype):
    q, k, v = (x.to(dtype) for x in row(110, 2))
    index = wave.build_index(k, v, SMALL)
    assert index.centroids.dtype == index.radius.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(index, wave.build_index(k.float(), v.float(), SMALL), strict=True))
    result = wave.wave_attention(q, k, v, index, SMALL, retrieval_ratio=1.0)
    assert result.out.dtype == dtype and result.lse.dtype == torch.float32
    want, lse = dense(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.out.double(), want, rtol=0, atol=2 * torch.finfo(dtype).eps)
