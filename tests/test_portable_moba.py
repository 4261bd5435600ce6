"""The portable MoBA backend against an oracle of loops, and against the reference where inputs are special."""

import math
import zlib

import pytest
import torch

import attnlab
from attnlab.kernels.cpu import moba as native
from attnlab.kernels.moba import portable
from attnlab.kernels.moba import portable_gate as gate
from attnlab.kernels.moba.spec import Spec, cdiv, slots
from attnlab.reference import moba as reference
from attnlab.testing import assert_accurate, gaussian, ragged
from tests import oracle

# lengths_q, lengths_k, heads, kv_heads, head_dim, block_size, topk, options
CASES = {
    "k=1": ([50], None, 2, 2, 32, 16, 1, {}),
    "k>=n": ([70], None, 2, 1, 32, 16, 9, {}),
    "B=1": ([40], None, 2, 1, 16, 1, 4, {}),
    "B=16": ([100], None, 2, 2, 32, 16, 3, {}),
    "B=48": ([150], None, 2, 1, 64, 48, 2, {}),
    "B=64": ([128], None, 2, 1, 64, 64, 2, {}),
    "B=100": ([230], None, 2, 1, 32, 100, 2, {}),
    "B=301": ([640], None, 2, 1, 16, 301, 2, {}),
    "T<B": ([20], None, 2, 1, 32, 512, 2, {}),
    "T=1": ([1], None, 2, 1, 32, 16, 2, {}),
    "T=0": ([0], None, 2, 1, 32, 16, 2, {}),
    "gqa 3": ([50], None, 6, 2, 32, 8, 3, {}),
    "gqa 8, group": ([50], None, 8, 1, 32, 8, 3, dict(group=True)),
    "D=80": ([60], None, 2, 1, 80, 16, 3, {}),
    "D=256": ([40], None, 1, 1, 256, 16, 2, {}),
    "Tq<Tk": ([37], [101], 2, 1, 32, 16, 3, {}),
    "Tq<Tk, B=512": ([5], [600], 2, 1, 32, 512, 2, {}),
    "Tq=1": ([1], [101], 2, 1, 32, 16, 3, {}),
    "not causal": ([30], [75], 4, 2, 32, 16, 2, dict(causal=False)),
    "not causal, Tq>Tk": ([75], [30], 4, 2, 32, 16, 3, dict(causal=False, group=True, sink_blocks=1)),
    "sink and local": ([90], None, 4, 2, 32, 8, 3, dict(sink_blocks=2, local_blocks=2)),
    "sink and local, group": ([70], [90], 4, 2, 32, 8, 3, dict(sink_blocks=1, local_blocks=3, group=True)),
    "everything by rule": ([40], None, 2, 1, 32, 8, 3, dict(sink_blocks=9, local_blocks=9)),
    "70 blocks, 66 selected": ([140], None, 1, 1, 16, 2, 66, {}),
    "pack": ([30, 0, 1, 45, 8], [30, 0, 17, 45, 20], 2, 1, 32, 8, 3, dict(sink_blocks=1)),
    "pack, not causal": ([30, 7, 0, 5], [30, 0, 8, 21], 2, 1, 32, 8, 2, dict(causal=False)),
}
WAYS = {"auto": portable.CALL_ELEMENTS, "gather": 0, "rows": 1 << 62}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Both formulations on every shape, besides the one that the shape asks for."""
    monkeypatch.setattr(portable, "CALL_ELEMENTS", WAYS[request.param])
    return request.param


class Problem:
    kernels = portable

    def __init__(self, case, dtype=torch.float64, with_sinks=False, workspace=2 << 30, strided=False):
        lengths_q, lengths_k, hq, hkv, d, block, topk, options = case
        lengths_k = lengths_k or lengths_q
        g = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))

        def make(n, h):
            x = torch.randn(h, n, d, generator=g, dtype=torch.float64).to(dtype).transpose(0, 1)
            return x if strided else x.contiguous()

        self.q, self.k, self.v = make(sum(lengths_q), hq), make(sum(lengths_k), hkv), make(sum(lengths_k), hkv)
        self.sinks = torch.randn(hq, generator=g, dtype=torch.float64) if with_sinks else None
        self.cu = ragged(lengths_q, lengths_k)
        self.dout = make(sum(lengths_q), hq)
        self.dlse = torch.randn(sum(lengths_q), hq, generator=g, dtype=torch.float64)
        given = dict(causal=True, group=False, sink_blocks=0, local_blocks=0) | options
        self.spec = Spec(block, topk, scale=d**-0.5, workspace_bytes=workspace, **given)
        self.slots = slots(self.spec, max(lengths_k))

    def forward(self, indices=None):
        return self.kernels.forward(self.q, self.k, self.v, self.sinks, indices, *self.cu, self.spec, self.slots)

    def backward(self, out, lse, indices, dlse):
        dlse = None if dlse is None else dlse.to(lse.dtype)
        given = (self.q, self.k, self.v, self.sinks, out, lse, indices)
        return self.kernels.backward(self.dout, dlse, *given, *self.cu, self.spec, self.slots)

    def expected(self, dtype=torch.float64, indices=None, dlse=True):
        """out, lse, then dq, dk, dv and dsinks, computed in `dtype`."""
        leaves = [
            x if x is None else x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v, self.sinks)
        ]
        if indices is None:
            indices = oracle.select(self.q, self.k, *self.cu, self.spec)
        seen = oracle.mask(indices, self.q, self.k, *self.cu, self.spec)
        out, lse = oracle.attend(*leaves, seen, self.spec.scale)
        loss = (out * self.dout.to(dtype)).sum()
        if dlse:
            dlse = self.dlse.masked_fill(~lse.isfinite(), 0.0).to(dtype)
            loss = loss + (lse.masked_fill(~lse.isfinite(), 0.0) * dlse).sum()
        grads = torch.autograd.grad(
            loss, [x for x in leaves if x is not None], allow_unused=True, materialize_grads=True
        )
        return [out.detach(), lse.detach(), *grads]


def finite(problem, lse):
    return problem.dlse.masked_fill(~lse.isfinite(), 0.0)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", CASES)
def test_float64_against_the_oracle(name, with_sinks, way):
    p = Problem(CASES[name], with_sinks=with_sinks, strided=with_sinks)
    out, lse, indices = p.forward()
    assert indices.dtype == torch.int32 and indices.shape[-1] == p.slots.total
    grads = p.backward(out, lse, indices, finite(p, lse))
    grads = [*grads[:3], grads[3]] if with_sinks else grads[:3]
    for got, want in zip((out, lse, *grads), p.expected(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for got, want in zip(p.backward(out, lse, indices, None)[:3], p.expected(dlse=False)[2:5], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["k>=n", "B=1", "B=48", "gqa 3", "gqa 8, group", "Tq<Tk", "not causal", "pack"])
def test_accuracy_in_other_dtypes(name, dtype, way):
    p = Problem(CASES[name], dtype=dtype, with_sinks=True)
    out, lse, indices = p.forward()
    dlse = finite(p, lse)
    grads = p.backward(out, lse, indices, dlse)
    assert (out.dtype, lse.dtype, *(g.dtype for g in grads[:3])) == (dtype, torch.float32, dtype, dtype, dtype)
    truth, plain = p.expected(indices=indices), p.expected(dtype, indices)
    for i, got in enumerate((out, lse, *grads)):
        # The sum over rows in dsinks cancels, and its terms hold the rounding of `out`.
        got = got.to(dtype) if i == 5 else got
        assert_accurate(got, truth[i], plain[i], roundings=(2, 2, 4, 4, 4, 8)[i], what=f"result {i}")


def test_selection_scores_and_replay():
    p = Problem(([60], None, 4, 2, 32, 8, 4, dict(sink_blocks=1, local_blocks=1)), dtype=torch.float32)
    indices, scores = portable.select(p.q, p.k, *p.cu, p.spec, p.slots)
    assert torch.equal(indices, p.forward()[2])
    picks = indices[..., 3:]
    means = gate.centroids(p.k, 8).repeat_interleave(2, 1)
    want = torch.einsum("thd,nhd->thn", p.q, means).gather(2, picks.clamp(min=0).long())
    torch.testing.assert_close(scores[..., 3:], want.masked_fill(picks < 0, -math.inf))
    assert ((scores[..., :3] == math.inf) == (indices[..., :3] >= 0)).all()
    other = indices.clone()
    other[..., 1:] = other[..., 1:].flip(-1)
    torch.testing.assert_close(p.forward(other)[0], p.forward()[0])


@pytest.mark.parametrize("select", [portable.select, native.select], ids=["portable", "cpu"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block, topk", [(4, 5), (4, 40), (16, 3)])
def test_ties_and_special_values_follow_the_rules(block, topk, causal, select):
    """Small integers make every score exact in float32, so indices must match the reference one for one."""
    g = torch.Generator().manual_seed(0)
    t, spec = 260, Spec(block, topk, causal, 1.0, False, 0, 0, 2 << 30)
    cu = torch.tensor([0, t], dtype=torch.int32)
    q, k = (torch.randint(-1, 2, (t, 2, 16), generator=g).float() for _ in range(2))

    def put(x, *places):
        x = x.clone()
        for row, value in places:
            x[row] = value
        return x

    inputs = {
        "ties": (q, k),
        "zeros": (q * 0, k),
        "negative zeros": (q * -0.0, k),
        "NaN in q": (put(q, (200, math.nan)), k),
        "NaN in k": (q, put(k, (17, math.nan), ((201, 1), math.nan), (203, -math.nan))),
        "infinities": (q, put(k, (50, math.inf), (120, -math.inf))),
        "overflow": (q * 3e19, k * 3e19),
        "all -inf": (torch.full_like(q, 1e20), torch.full_like(k, -1e20)),
        "near ties": (q, k * (1 + 2**-20 * torch.randint(0, 4, k.shape, generator=g))),
    }
    for name, (a, b) in inputs.items():
        got, scores = select(a, b, cu, cu, spec, slots(spec, t))
        want, value = reference.moba_select(a[None], b[None], block_size=block, topk=topk, causal=causal)
        if name == "near ties":
            torch.testing.assert_close(scores, value[0])
            continue
        assert torch.equal(got, want[0]), name
        torch.testing.assert_close(scores, value[0], equal_nan=True)


def test_exact_and_fast_selection_agree():
    s = torch.randn(2, 97, 64).mul(8).round() / 8
    s[0, :, 3], s[1, 5, 7], s[1, 6, 8] = -0.0, math.nan, -math.inf
    for count in (1, 7, 33, 97):
        want = s.sort(dim=1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(gate._best(s.clone(), count, None, False)[0], want)
        assert torch.equal(torch.stack([gate._exact(x, count) for x in s]), want)


def test_nan_rows_stay_alone(way):
    p = Problem(([70], None, 2, 1, 32, 16, 3, {}), dtype=torch.float32)
    clean = p.forward()[0]
    p.q[0, 0] = p.q[41, 1] = math.nan
    out = p.forward()[0]
    bad = torch.zeros(70, 2, dtype=torch.bool)
    bad[0, 0] = bad[41, 1] = True
    assert out[bad].isnan().all()
    torch.testing.assert_close(out[~bad], clean[~bad])


def test_unused_slots_read_nothing(way):
    """The first block's values are NaN: queries of later blocks that did not choose it must not see them."""
    p = Problem(([64], None, 1, 1, 32, 16, 2, {}), dtype=torch.float32)
    p.v[:16] = math.nan
    out, _, indices = p.forward()
    assert torch.equal(out.isnan().any(-1), (indices == 0).any(-1))


@pytest.mark.parametrize("name", ["gqa 3", "gqa 8, group", "pack", "not causal"])
def test_tight_workspace_changes_nothing(name):
    loose, tight = (Problem(CASES[name], workspace=w) for w in (2 << 30, 4096))
    out, lse, indices = loose.forward()
    torch.testing.assert_close(tight.forward()[:2], (out, lse))
    first, second = (p.backward(out, lse, indices, None)[:3] for p in (loose, tight))
    torch.testing.assert_close(first, second)


def test_reruns_are_bitwise_equal(way):
    p = Problem(([150], None, 4, 2, 32, 16, 4, {}), dtype=torch.float32, with_sinks=True)
    out, lse, indices = p.forward()
    for _ in range(2):
        again = p.forward()
        assert all(map(torch.equal, (out, lse, indices), again))
    grads = p.backward(out, lse, indices, p.dlse)
    assert all(map(torch.equal, grads, p.backward(out, lse, indices, p.dlse)))


@pytest.mark.parametrize("cut", [1, 7, 16, 50])
def test_prefill_in_chunks_equals_one_shot(cut):
    p = Problem(([101], None, 2, 1, 32, 16, 3, dict(local_blocks=1)))
    out, lse, indices = p.forward()
    for a in range(0, 101, cut):
        b = min(a + cut, 101)
        cu_q, cu_k = ragged([b - a], [b])
        n = slots(p.spec, b)
        o, x, chosen = portable.forward(p.q[a:b], p.k[:b], p.v[:b], None, None, cu_q, cu_k, p.spec, n)
        torch.testing.assert_close((o, x), (out[a:b], lse[a:b]))
        same = (chosen.sort(-1, descending=True).values, indices[a:b].sort(-1, descending=True).values[..., : n.total])
        assert torch.equal(*same)


@pytest.mark.parametrize("name", ["gqa 8, group", "Tq<Tk", "sink and local", "pack", "pack, not causal", "B=1"])
def test_gradcheck(name, way):
    """Also of the lse and of the sinks. The choice is replayed: it has no gradient."""
    lengths_q, lengths_k, *rest = CASES[name]
    shorter = [[min(n, 13) for n in x or lengths_q] for x in (lengths_q, lengths_k)]
    p = Problem((*shorter, rest[0], rest[1], 5, min(rest[3], 4), *rest[4:]), with_sinks=True)
    _, x, indices = p.forward()
    real = x.isfinite()

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            p.q, p.k, p.v, p.sinks = leaves
            out, lse, _ = p.forward(indices)
            ctx.save_for_backward(*leaves, out, lse)
            return out, lse.masked_fill(~real, 0.0)

        @staticmethod
        def backward(ctx, dout, dlse):
            p.q, p.k, p.v, p.sinks, out, lse = ctx.saved_tensors
            p.dout = dout
            return p.backward(out, lse, indices, dlse.masked_fill(~real, 0.0))

    leaves = [t.detach().clone().requires_grad_() for t in (p.q, p.k, p.v, p.sinks)]
    assert torch.autograd.gradcheck(Attention.apply, leaves, fast_mode=True)


def test_explicit_attention_matches_flash(monkeypatch):
    """What other devices run, here on the CPU: it must not depend on the CPU's flash kernel."""
    from attnlab.kernels.states import portable as states

    monkeypatch.setattr(states, "SCORE_ELEMENTS", 1 << 9)
    monkeypatch.setattr(states, "uses_cpu_kernel", lambda x: False)
    for name in ("gqa 3", "Tq<Tk", "pack", "not causal"):
        p = Problem(CASES[name], with_sinks=True)
        out, lse, indices = p.forward()
        grads = p.backward(out, lse, indices, finite(p, lse))
        for got, want in zip((out, lse, *grads), p.expected(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_blocks_by_the_hundred():
    p = Problem(([1200], None, 2, 1, 16, 4, 70, {}), dtype=torch.float32)
    out, lse, indices = p.forward()
    assert p.slots.total == 70 and cdiv(1200, 4) == 300
    want, want_lse = reference.moba_attention(
        *(x[None].double() for x in (p.q, p.k, p.v)), block_size=4, topk=70, indices=indices[None]
    )
    torch.testing.assert_close(out, want[0].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_threads_change_nothing(heads, kv_heads):
    """Heads run on Python threads when PyTorch may use several; CI's workers have one each, so ask for them."""
    x = [t.requires_grad_() for t in gaussian(1, 700, 700, heads, kv_heads, 16)]

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = attnlab.moba_attention(*x, block_size=32, topk=3, backend="portable")
            grads = torch.autograd.grad(out.square().sum(), x)
            assert torch.get_num_threads() == threads
            return out, *grads
        finally:
            torch.set_num_threads(before)

    alone = run(1)
    for threads in (2, 3):
        for a, b in zip(alone, run(threads), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(run(2), run(2), strict=True))


def test_threads_keep_inference_mode():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            x = gaussian(1, 700, 700, 2, 2, 16)
            found = attnlab.moba_attention(*x, block_size=32, topk=3, backend="portable")
            assert found.is_inference()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, attnlab.moba_attention(*gaussian(1, 700, 700, 2, 2, 16), block_size=32, topk=3))
