"""Dense attention and the merge on Triton against the float64 reference.

Without a GPU Triton interprets, where bfloat16 is wrong: float16 and float32 here, bfloat16 on a GPU.
"""

import math

import pytest
import torch

from attnlab.kernels import configs
from attnlab.kernels.states.launch import attention, attention_backward, merge, merge_backward
from attnlab.reference.states import full_attention, merge_states

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
BOUND = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that short sequences run through every phase of a kernel."""
    real = configs.get
    monkeypatch.setattr(configs, "get", lambda *key: real(*key) | {"BLOCK_M": 32, "BLOCK_N": 16})


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def assert_close(x, truth, dtype):
    assert x.isfinite().equal(truth.isfinite())
    x, truth = (y.double().masked_fill(~y.isfinite(), 0.0) for y in (x, truth))
    assert (x - truth).abs().max() <= BOUND[dtype] * max(1.0, truth.abs().max().item())


CASES = {
    "plain": dict(lq=[70], lk=[70], hq=2, hkv=2, d=32),
    "ragged_gqa3_sinks": dict(lq=[0, 5, 40], lk=[3, 30, 60], hq=3, hkv=1, d=80, sinks=True),
    "window": dict(lq=[3, 50], lk=[40, 50], hq=4, hkv=2, d=16, window=17, sinks=True),
    "window_one": dict(lq=[20], lk=[20], hq=1, hkv=1, d=16, window=1),
    "not_causal": dict(lq=[7, 0, 33], lk=[0, 9, 50], hq=2, hkv=1, d=16, causal=False),
    "negative_scale": dict(lq=[20], lk=[30], hq=2, hkv=1, d=16, scale=-0.4),
    "zero_scale": dict(lq=[5], lk=[40], hq=1, hkv=1, d=16, scale=0.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_and_gradients(case, dtype, device):
    c = dict(causal=True, window=None, scale=0.2, sinks=False) | CASES[case]
    torch.manual_seed(0)
    q = torch.randn(c["hq"], sum(c["lq"]), c["d"], device=device, dtype=dtype).transpose(0, 1)  # strided on purpose
    k, v = torch.randn(2, sum(c["lk"]), c["hkv"], c["d"], device=device, dtype=dtype)
    sinks = torch.randn(c["hq"], device=device) if c["sinks"] else None
    cu_q, cu_k = cumulative(c["lq"], device), cumulative(c["lk"], device)
    options = (cu_q, cu_k, c["causal"], c["window"], c["scale"])

    exact = [x.double().requires_grad_() for x in (q, k, v, *([sinks] if c["sinks"] else []))]
    truth = full_attention(
        *(x[None] for x in exact[:3]), causal=c["causal"], window=c["window"], scale=c["scale"],
        sinks=exact[3] if c["sinks"] else None, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
    )  # fmt: skip
    out, lse = attention(q, k, v, sinks, *options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, truth[0][0], dtype)
    assert_close(lse, truth[1][0], dtype)

    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad([x[0] for x in truth], exact, (dout.double(), dlse.double()))
    grads = attention_backward(dout, dlse, q, k, v, sinks, out, lse, *options)
    for x, y in zip(grads, expected, strict=False):
        assert_close(x, y, dtype)
    assert (grads[3] is None) == (sinks is None)
    again = attention_backward(dout, dlse, q, k, v, sinks, out, lse, *options)
    assert all(x is y is None or x.equal(y) for x, y in zip(grads, again, strict=True))


def test_no_queries_and_no_keys(device):
    q, k = torch.randn(2, 2, 16, device=device), torch.randn(0, 1, 16, device=device)
    cu_q, cu_k = cumulative([2], device), cumulative([0], device)
    sinks = torch.tensor([1.0, 2.0], device=device)
    out, lse = attention(q, k, k, None, cu_q, cu_k, False, None, 1.0)
    assert out.eq(0).all() and lse.eq(-math.inf).all()
    out, lse = attention(q, k, k, sinks, cu_q, cu_k, False, None, 1.0)
    assert out.eq(0).all() and lse.sub(sinks).abs().max() < 1e-6
    grads = attention_backward(out, None, q, k, k, sinks, out, lse, cu_q, cu_k, False, None, 1.0)
    assert all(x.eq(0).all() for x in grads)
    out, lse = attention(q[:0], q, q, None, cu_k, cu_q, True, None, 1.0)
    assert out.shape == (0, 2, 16) and lse.shape == (0, 2)


def merged(outs, lses):
    """`outs [N, M, D]`, `lses [N, M]` -> `out [M, D]`, `lse [M]`."""
    out, lse = torch.full_like(outs[0], math.nan), torch.full_like(lses[0], math.nan)
    merge(outs[:, :, None], lses[..., None], None, None, False, out[:, None], lse[:, None], None)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards, rows, d", [(1, 3, 5), (3, 40, 80), (5, 9, 300)])
def test_merge_and_gradients(shards, rows, d, dtype, device):
    torch.manual_seed(0)
    outs = torch.randn(shards, rows, d, device=device).to(dtype)
    lses = torch.randn(rows, shards, device=device).T * 3
    lses[0, 0], lses[-1, 1], lses[:, 2] = math.inf, -math.inf, math.inf
    dirty = outs.masked_fill(lses.isinf()[..., None], math.nan)
    if shards > 2:
        lses[1, 0] = -5e3  # a weight that underflows: its payload is not read either
        dirty[1, 0] = math.nan
    exact = outs.double().requires_grad_(), lses.double().requires_grad_()
    truth = merge_states(*exact)
    out, lse = merged(dirty, lses)
    assert_close(out, truth[0], dtype)
    assert_close(lse, truth[1], dtype)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    for g in (dlse, None):
        given = dout.double(), torch.zeros_like(lse).double() if g is None else g.double()
        expected = torch.autograd.grad(truth, exact, given, retain_graph=True)
        rows = (x if x is None else x[:, None] for x in (dout, g))
        shards = dirty[:, :, None], lses[..., None]
        found = merge_backward(*rows, *shards, None, None, False, out[:, None], lse[:, None])
        for x, y in zip(found, expected, strict=True):
            assert_close(x.view(y.shape), y, dtype)


def test_merge_of_splits_is_the_whole(device):
    torch.manual_seed(0)
    q, k, v = torch.randn(12, 2, 16, device=device), *torch.randn(2, 50, 1, 16, device=device)

    def part(a, b):
        cu_q, cu_k = cumulative([12], device), cumulative([b - a], device)
        return attention(q, k[a:b], v[a:b], None, cu_q, cu_k, False, None, 0.3)

    whole, parts = part(0, 50), [part(0, 20), part(20, 20), part(20, 50)]
    outs, lses = (torch.stack(x).flatten(1, 2) for x in zip(*parts, strict=True))
    out, lse = merged(outs, lses)
    assert_close(out.view_as(whole[0]), whole[0].double(), torch.float32)
    assert_close(lse.view_as(whole[1]), whole[1].double(), torch.float32)
