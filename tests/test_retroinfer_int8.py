"""`WaveConfig(meta_dtype="int8")`: mean keys and values in 8 bits, with bounds that stay bounds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnlab
from attnlab import WaveConfig, WaveIndex, full_attention, wave_attention, wave_index
from attnlab.kernels.retroinfer.portable_attend import look
from attnlab.kernels.retroinfer.spec import from_int8, part, to_int8
from attnlab.testing import gaussian
from attnlab.wave_config import kernel_reasons
from tests.test_retroinfer_api import assert_same, pieces
from tests.test_retroinfer_attend import unread_share
from tests.test_retroinfer_reference import adversarial
from tests.wave_stores import QUERY, Rows, ask, build, labels_of

SMALL = WaveConfig(sink=2, local=5, segment=40, tokens_per_cluster=4, iterations=4, update_every=12)
INT8 = WaveConfig(**SMALL.__dict__ | dict(meta_dtype="int8", retrieval_ratio=0.3, estimation_ratio=0.4))
CLOSE = dict(rtol=1e-10, atol=1e-10)
Q, K, V = gaussian(3, 1, 131, 4, 2, 8, dtype=torch.float64)


@given(seed=st.integers(0, 1000), power=st.integers(-30, 30), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_value_is_at_most_half_a_step_off(seed, power, dtype):
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed)).to(dtype) * 10.0**power
    x[0, 0] = 0
    x[0, 1, 1:] = 0
    counts, step = to_int8(x)
    assert counts.dtype == torch.int8 and step.dtype == torch.bfloat16 and (counts[0, 0] == 0).all()
    found = from_int8(counts, step[..., None], 0).to(dtype)
    assert ((found - x).abs() <= step.to(dtype)[..., None] * (0.5 + 1e-5)).all()
    assert (step.to(dtype) <= x.abs().amax(-1) / 127 * 1.01).all() and int(counts.abs().max()) >= 125


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(estimation="all", group_reduce="max"),
        dict(weight_by_size=True, group_reduce="mean"),
        dict(budget="adaptive", max_error=0.3),
        dict(max_cluster=5, final_pass="global"),
    ],
    ids=str,
)
def test_both_backends_read_the_same_rounded_means(change):
    config = WaveConfig(**INT8.__dict__ | change)
    index = pieces(K, V, [70, 20] + [1] * 30 + [11], config)
    options = dict(return_lse=True, return_error_bound=True)
    found, want = (wave_attention(Q, index, backend=b, **options) for b in ("portable", "reference"))
    for x, y in zip((*found[:2], *found[2]), (*want[:2], *want[2]), strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    exact = pieces(K, V, [70, 20] + [1] * 30 + [11], WaveConfig(**config.__dict__ | dict(meta_dtype=None)))
    assert index.clusters == exact.clusters and torch.equal(index.store.tokens, exact.store.tokens)
    assert not torch.equal(wave_attention(Q, exact), found[0])


@pytest.mark.parametrize("selector", ["wave", "cluster"])
def test_selectors_read_them_too(selector):
    for dtype, close in ((torch.float64, CLOSE), (torch.float16, dict(rtol=5e-3, atol=5e-3))):
        q, index = Q.to(dtype), WaveIndex.build(K.to(dtype), V.to(dtype), INT8)
        options = dict(selector=selector, token_budget=0.2, return_lse=True)
        found, want = (wave_attention(q, index, backend=b, **options) for b in ("portable", "reference"))
        torch.testing.assert_close(found, want, **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_stored_and_the_radius_to_it(dtype):
    index = pieces(K.to(dtype), V.to(dtype), [60, 60, 11], INT8)
    store, plain = index.store, pieces(K.double(), V.double(), [60, 60, 11], SMALL).store
    assert store.centroids.dtype == store.value_means.dtype == torch.int8
    assert store.steps.shape == (*store.radius.shape, 2) and plain.steps.shape == (*plain.radius.shape, 0)
    means = [from_int8(x, store.steps, i).double() for i, x in enumerate((store.centroids, store.value_means))]
    for b in range(3):
        labels = labels_of(store, b, index.config.spec)
        for g in range(2):
            k, v = (x[b, 2 : 2 + labels.shape[1], g].to(dtype).double() for x in (K, V))
            for c in range(index.clusters[b]):
                mine = labels[g] == c
                if not mine.any():
                    continue
                for i, x in enumerate((k, v)):
                    off = (x[mine].mean(0) - means[i][b, g, c]).abs().max()
                    assert off <= float(store.steps[b, g, c, i]) * 0.5001
                far = (k[mine] - means[0][b, g, c]).norm(dim=-1).max()
                assert float(store.radius[b, g, c]) == pytest.approx(float(far), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(store.value_sums.double(), means[1] * store.sizes[..., None])


@given(
    kind=st.sampled_from(["random", "aligned", "orthogonal", "outlier", "copies"]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.5, -0.7, 3.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_bounds_hold(kind, seed, scale, dtype):
    """Of each cluster's mass, and of the share that was not read, for the true keys."""
    q, k, v = (x.to(dtype) for x in adversarial(kind, 60, seed))
    x = Rows(q[None], [k], [v])
    store, query = build(x, int8=True), QUERY._replace(scale=scale)
    acc = torch.promote_types(dtype, torch.float32)
    wide = Rows(q[None].double(), [k.double()], [v.double()])
    meta = look(q.to(acc).view(1, 2, -1, q.shape[1]), store, query)
    logits = torch.einsum("hd,thd->ht", wide.q[0], wide.k[0].repeat_interleave(len(q) // 2, 1)) * scale
    members = labels_of(store, 0).repeat_interleave(len(q) // 2, 0)
    low, high = (y[0].flatten(0, 1).double() for y in (meta.low, meta.high))
    off = 1e-9 if dtype is torch.float64 else 1e-5 * float(logits.abs().max() + 1)
    for c in range(low.shape[1]):
        true = logits[:, 2:55].masked_fill(members != c, -math.inf).logsumexp(-1)
        assert (true >= low[:, c] - off).all() and (true <= high[:, c] + off).all()
    got = ask(x, store, query)
    true = unread_share(wide, store, got, 0, scale)
    assert (got.lower[0] <= true + off).all() and (true <= got.upper[0] + off).all()


@pytest.mark.parametrize("estimation", ["ratio", "all"])
def test_rounding_adds_little_to_the_error(estimation):
    """On keys near cluster centres, against full attention: at most a tenth more than the estimate's own error."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(2, 64, 64, generator=g)
    run = torch.randint(64, (2048,), generator=g)
    k = (centre[:, run] + 0.3 * torch.randn(2, 2048, 64, generator=g)).transpose(0, 1)[None]
    v = (centre.flip(0)[:, run] + 0.3 * torch.randn(2, 2048, 64, generator=g)).transpose(0, 1)[None]
    q = (1.5 * centre[:, :4].transpose(0, 1).flatten(0, 1))[None, None].contiguous()
    dense, errors = full_attention(q, k, v), []
    for meta in (None, "int8"):
        index = WaveIndex.build(k, v, WaveConfig(segment=1024, meta_dtype=meta, estimation=estimation))
        errors.append(float((wave_attention(q, index) - dense).norm() / dense.norm()))
    assert errors[1] <= 1.1 * errors[0] and 0 < errors[0] < 0.2


@pytest.mark.parametrize("dim, most", [(64, 0.035), (128, 0.033), (256, 0.032)])
def test_bytes(dim, most):
    def share(dtype, meta):
        index = WaveIndex.build(
            *torch.zeros(2, 1, 8192, 1, dim, dtype=dtype), WaveConfig(meta_dtype=meta, iterations=1)
        )
        assert index.meta_bytes == index.clusters[0] * (2 * dim * (1 if meta else dtype.itemsize) + 8 + 4 * bool(meta))
        return index.meta_bytes / index.kv_bytes

    assert share(torch.float16, "int8") <= most and share(torch.float32, "int8") <= most / 2
    assert 0.06 < share(torch.bfloat16, None) <= 0.065


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_file_holds_it(dtype, tmp_path):
    k, v, q = (x.to(dtype) for x in (K, V, Q))
    index = WaveIndex.build(k, v, INT8, lengths=[80, 50, 4], capacity=131)
    index.save(tmp_path / "one")
    again = WaveIndex.load(tmp_path / "one")
    assert again.config == INT8
    for tokens in (0, 40, 1):
        for i in (index, again):
            i.append(k[:, :tokens], v[:, :tokens])
        assert_same(index, again)
        for b, n in enumerate(index.clusters):
            assert torch.equal(index.store.steps[b, :, :n], again.store.steps[b, :, :n])
        assert torch.equal(wave_attention(q, index), wave_attention(q, again))


def test_not_finite_values_show_where_the_references_do():
    for change in (dict(k=torch.nan), dict(k=torch.inf), dict(v=torch.nan), dict(v=-torch.inf)):
        x = dict(k=K.clone(), v=V.clone())
        for name, value in change.items():
            x[name][:, 50:60, 0] = value
        index = WaveIndex.build(**x, config=WaveConfig(**INT8.__dict__ | dict(estimation="all")))
        found, want = (wave_attention(Q, index, return_lse=True, backend=b) for b in ("portable", "reference"))
        torch.testing.assert_close(found, want, equal_nan=True, **CLOSE)
        assert found[0][:, :, :2].isnan().all() and found[0][:, :, 2:].isfinite().all()


def test_everything_retrieved_is_full_attention():
    index = WaveIndex.build(K, V, INT8)
    torch.testing.assert_close(wave_attention(Q, index, retrieval_ratio=1.0), full_attention(Q, K, V), **CLOSE)


def test_gpu_backends_refuse_it(monkeypatch):
    monkeypatch.setitem(wave_index.BACKENDS, "triton", lambda call: [])
    why = "triton: meta_dtype='int8' is for reference and portable only"
    with pytest.raises(attnlab.BackendError, match=f"WaveIndex: backend='triton' cannot serve this call[^$]*{why}"):
        WaveIndex.build(K, V, INT8, backend="triton")
    with pytest.raises(
        attnlab.BackendError, match=f"wave_attention: backend='triton' cannot serve this call[^$]*{why}"
    ):
        wave_attention(Q, WaveIndex.build(K, V, INT8), backend="triton")
    assert attnlab.explain(WaveIndex.build, K, V, SMALL, backend="triton").chosen == "triton"
    assert kernel_reasons(SMALL) == []


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_opcheck(backend):
    index = WaveIndex.build(K, V, INT8, lengths=[131, 60, 5])
    query = (0.3, "sum", False, "ratio", part(0.3, max(index.clusters)), 0.0, True, "wave", None, 0, 0)
    torch.library.opcheck(
        torch.ops.attnlab.wave_attention.default, (Q[:, 0], *index.store, *INT8.spec, *query, [], "clock", backend)
    )
