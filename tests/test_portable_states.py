"""Portable dense attention and merge against an oracle of loops."""

import math
import zlib

import pytest
import torch

from attnlab.kernels.states import portable
from attnlab.testing import assert_accurate, ragged
from tests import oracle

# lengths_q, lengths_k, heads, kv_heads, head_dim, causal, window
CASES = {
    "causal": ([70], None, 2, 2, 32, True, None),
    "batch": ([33, 33, 33], None, 2, 1, 16, True, None),
    "gqa 3": ([40], None, 6, 2, 32, True, None),
    "gqa 8": ([40], None, 8, 1, 80, True, None),
    "Tq<Tk": ([20], [75], 2, 1, 32, True, None),
    "Tq=1": ([1], [75], 4, 2, 32, True, None),
    "not causal": ([30], [50], 4, 2, 32, False, None),
    "not causal, Tq>Tk": ([50], [30], 2, 2, 32, False, None),
    "no keys": ([5], [0], 2, 1, 16, False, None),
    "nothing": ([0], [0], 2, 1, 16, True, None),
    "no queries": ([0], [9], 2, 1, 16, True, None),
    "pack": ([30, 0, 1, 45], [30, 0, 17, 50], 2, 1, 32, True, None),
    "pack, not causal": ([30, 7, 0, 5], [30, 0, 8, 21], 2, 1, 32, False, None),
    "window 1": ([150], None, 2, 1, 16, True, 1),
    "window 7": ([150], None, 2, 2, 16, True, 7),
    "window 64": ([200], None, 2, 1, 16, True, 64),
    "window 100": ([250], None, 2, 1, 16, True, 100),
    "window > T": ([90], None, 2, 1, 16, True, 1000),
    "window, Tq<Tk": ([130], [300], 4, 2, 16, True, 90),
    "window, pack": ([30, 0, 1, 145], [30, 0, 170, 150], 2, 1, 16, True, 66),
}


class Problem:
    def __init__(self, case, dtype=torch.float64, with_sinks=False):
        lengths_q, lengths_k, hq, hkv, d, self.causal, self.window = case
        lengths_k = lengths_k or lengths_q
        g = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
        nq, nk = sum(lengths_q), sum(lengths_k)
        shapes = [(nq, hq, d), (nk, hkv, d), (nk, hkv, d), (nq, hq, d)]
        self.q, self.k, self.v, self.dout = (
            torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in shapes
        )
        self.dlse = torch.randn(nq, hq, generator=g, dtype=torch.float64)
        self.sinks = torch.randn(hq, generator=g, dtype=torch.float64) if with_sinks else None
        self.cu, self.scale = ragged(lengths_q, lengths_k), d**-0.5

    def run(self):
        options = (*self.cu, self.causal, self.window, self.scale)
        out, lse = portable.attention(self.q, self.k, self.v, self.sinks, *options)
        dlse = self.dlse.masked_fill(~lse.isfinite(), 0.0).to(lse.dtype)
        given = (self.q, self.k, self.v, self.sinks, out, lse)
        grads = portable.attention_backward(self.dout, dlse, *given, *options)
        return [out, lse, *(x for x in grads if x is not None)]

    def expected(self, dtype=torch.float64):
        leaves = [
            x if x is None else x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v, self.sinks)
        ]
        seen = oracle.dense_mask(self.q, self.k, *self.cu, self.causal, self.window)
        out, lse = oracle.attend(*leaves, seen, self.scale)
        real = lse.isfinite()
        loss = (out * self.dout.to(dtype)).sum() + (lse * self.dlse.to(dtype))[real].sum()
        inputs = [x for x in leaves if x is not None]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize("kernel", ["flash", "explicit"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", CASES)
def test_float64_against_the_oracle(name, with_sinks, kernel, monkeypatch):
    if kernel == "explicit":
        monkeypatch.setattr(portable, "uses_cpu_kernel", lambda x: False)
        monkeypatch.setattr(portable, "SCORE_ELEMENTS", 1 << 10)
    p = Problem(CASES[name], with_sinks=with_sinks)
    for got, want in zip(p.run(), p.expected(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", ["flash", "explicit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gqa 3", "Tq<Tk", "not causal", "pack", "window, Tq<Tk"])
def test_accuracy_in_other_dtypes(name, dtype, kernel, monkeypatch):
    if kernel == "explicit":
        monkeypatch.setattr(portable, "uses_cpu_kernel", lambda x: False)
    p = Problem(CASES[name], dtype=dtype, with_sinks=True)
    truth, plain = p.expected(), p.expected(dtype)
    for i, got in enumerate(p.run()):
        assert got.dtype == (torch.float32 if i in (1, 5) else dtype)
        # The sum over rows in dsinks cancels, and its terms hold the rounding of `out`.
        got = got.to(dtype) if i == 5 else got
        assert_accurate(got, truth[i], plain[i], roundings=(2, 2, 4, 4, 4, 8)[i], what=f"result {i}")


@pytest.mark.parametrize("kernel", ["flash", "explicit"])
@pytest.mark.parametrize("name", ["gqa 3", "Tq<Tk", "not causal", "window, Tq<Tk"])
def test_negative_scale_and_gaps_between_elements(name, kernel, monkeypatch):
    if kernel == "explicit":
        monkeypatch.setattr(portable, "uses_cpu_kernel", lambda x: False)
    p = Problem(CASES[name])
    p.scale *= -1
    want = p.expected()
    p.q, p.k, p.v, p.dout = (torch.stack([x, x * math.nan], -1)[..., 0] for x in (p.q, p.k, p.v, p.dout))
    for got, truth in zip(p.run(), want, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)


def test_huge_scores_and_nan_rows():
    p = Problem(CASES["Tq<Tk"], dtype=torch.float32)
    p.q *= 1e4
    assert_accurate(p.run()[0], p.expected()[0], p.expected(torch.float32)[0], roundings=8)
    p.q[3, 1] = math.nan
    bad = p.run()[0].isnan().any(-1)
    assert bad[3, 1] and bad.sum() == 1


def test_sinks_of_empty_rows():
    p = Problem(CASES["no keys"], with_sinks=True)
    out, lse = p.run()[:2]
    assert (out == 0).all() and torch.equal(lse, p.sinks.expand_as(lse))
    p.sinks = torch.full_like(p.sinks, -math.inf)
    out, lse, *grads = p.run()
    assert (out == 0).all() and (lse == -math.inf).all() and all(g.isfinite().all() for g in grads)


def merged(outs, lses):
    """`outs [N, M, D]`, `lses [N, M]` -> `out [M, D]`, `lse [M]`."""
    out, lse = torch.full(outs.shape[1:], math.nan, dtype=outs.dtype), torch.full(lses.shape[1:], math.nan).to(lses)
    portable.merge(outs[:, :, None], lses[..., None], None, None, False, out[:, None], lse[:, None], None)
    return out, lse


def merge_gradients(dout, dlse, outs, lses, out, lse):
    dlse = None if dlse is None else dlse[:, None]
    given = dout[:, None], dlse, outs[:, :, None], lses[..., None], None, None, False, out[:, None], lse[:, None]
    douts, dlses = portable.merge_backward(*given)
    return douts[:, :, 0], dlses[..., 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_merge_against_softmax(n, dtype):
    g = torch.Generator().manual_seed(n)
    outs = torch.randn(n, 9, 16, generator=g, dtype=torch.float64).to(dtype)
    acc = torch.promote_types(dtype, torch.float32)
    lses = (torch.randn(n, 9, generator=g, dtype=torch.float64) * 3).to(acc)
    lses[:, 0], lses[0, 1], lses[-1, 2] = -math.inf, math.inf, -math.inf
    outs = outs.masked_fill(lses.isinf()[..., None], math.nan)
    out, lse = merged(outs, lses)
    clean = lses.double().masked_fill(lses == math.inf, -math.inf)
    weights = clean.softmax(0).nan_to_num(0.0)
    want = (weights[..., None] * outs.double().nan_to_num(0.0)).sum(0)
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype.itemsize == 2 else dict(rtol=1e-5, atol=1e-5)
    assert (out.dtype, lse.dtype) == (dtype, acc)
    torch.testing.assert_close(out.double(), want, **tolerance)
    torch.testing.assert_close(lse.double(), clean.logsumexp(0), rtol=1e-5, atol=1e-5)


def test_merge_of_shards_is_the_whole():
    p = Problem(([40], [40], 2, 2, 16, False, None))
    whole = p.run()
    shards = []
    for a, b in ((0, 3), (3, 3), (3, 40)):
        cu = ragged([40], [b - a])
        shards.append(portable.attention(p.q, p.k[a:b], p.v[a:b], None, *cu, False, None, p.scale))
    outs, lses = (torch.stack(x).flatten(1, 2) for x in zip(*shards, strict=True))
    out, lse = merged(outs, lses)
    torch.testing.assert_close((out, lse), (whole[0].flatten(0, 1), whole[1].flatten()))


@pytest.mark.parametrize("with_dlse", [False, True])
def test_merge_backward(with_dlse):
    g = torch.Generator().manual_seed(1)
    outs = torch.randn(3, 7, 4, generator=g, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 7, generator=g, dtype=torch.float64, requires_grad=True)
    dout, dlse = torch.randn(7, 4, generator=g, dtype=torch.float64), torch.randn(7, generator=g, dtype=torch.float64)
    out, lse = (lses.softmax(0)[..., None] * outs).sum(0), lses.logsumexp(0)
    loss = (out * dout).sum() + (lse * dlse).sum() * with_dlse
    want = torch.autograd.grad(loss, (outs, lses))
    given = [x.detach() for x in (outs, lses, out, lse)]
    torch.testing.assert_close(merge_gradients(dout, dlse if with_dlse else None, *given), want)


def test_merge_backward_of_empty_shards_is_zero():
    outs = torch.full((2, 3, 4), math.nan, dtype=torch.float64)
    lses = torch.tensor([[math.inf, -math.inf, -math.inf], [-math.inf, -math.inf, 1.0]], dtype=torch.float64)
    outs[1, 2] = 1.0
    out, lse = merged(outs, lses)
    assert torch.equal(out, torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64).expand(3, 4))
    douts, dlses = merge_gradients(torch.ones(3, 4, dtype=torch.float64), torch.ones(3), outs, lses, out, lse)
    assert torch.equal(dlses[1], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)) and not dlses[0].any()
    assert (douts[1, 2] == 1).all() and not douts[0].any() and not douts[1, :2].any()


def test_reruns_are_bitwise_equal():
    p = Problem(CASES["window, Tq<Tk"], dtype=torch.float32, with_sinks=True)
    assert all(map(torch.equal, p.run(), p.run()))
