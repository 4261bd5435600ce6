"""MoBA's backward stages on Triton against autograd through the float64 reference, one selection for both.

Without a GPU Triton interprets, where bfloat16 is wrong: float16 and float32 here, bfloat16 on a GPU.
"""

import pytest
import torch

from attnlab.kernels import configs
from attnlab.kernels.moba import backward, portable
from attnlab.kernels.moba.spec import Spec, geometry, slots
from attnlab.reference.moba import moba_attention

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
BOUND = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

CASES = {
    "plain": dict(lq=[50], lk=[50], hq=2, hkv=2, d=32, block=16, topk=2),
    "odd_block_extras": dict(lq=[33, 12], lk=[33, 12], hq=2, hkv=1, d=16, block=7, topk=3, group=True, sink=1, local=1),
    "own_only": dict(lq=[40], lk=[40], hq=2, hkv=1, d=16, block=16, topk=1),
    "everything_gqa3": dict(lq=[0, 5, 20], lk=[3, 20, 48], hq=3, hkv=1, d=80, block=16, topk=9),
    "block_of_one": dict(lq=[14], lk=[18], hq=2, hkv=1, d=16, block=1, topk=4, local=1),
    "wider_than_text": dict(lq=[20], lk=[30], hq=4, hkv=2, d=16, block=100, topk=3, group=True),
    "block_of_48": dict(lq=[30], lk=[120], hq=1, hkv=1, d=16, block=48, topk=2),
    "not_causal": dict(lq=[5, 0, 20], lk=[0, 9, 40], hq=2, hkv=1, d=16, block=16, topk=2, causal=False),
}


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def problem(name, dtype, device, workspace=2 << 30):
    c = dict(causal=True, group=False, sink=0, local=0) | CASES[name]
    torch.manual_seed(0)
    q = torch.randn(sum(c["lq"]), c["hq"], c["d"], device=device, dtype=dtype)
    k, v = torch.randn(2, sum(c["lk"]), c["hkv"], c["d"], device=device, dtype=dtype)
    cu_q, cu_k = cumulative(c["lq"], device), cumulative(c["lk"], device)
    spec = Spec(c["block"], c["topk"], c["causal"], 0.3, c["group"], c["sink"], c["local"], workspace)
    nslots = slots(spec, max(c["lk"]))
    indices, _ = portable.select(q, k, cu_q, cu_k, spec, nslots)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = moba_attention(
        *(x[None] for x in exact), block_size=c["block"], topk=c["topk"], causal=c["causal"], scale=0.3,
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, indices=indices[None],
    )  # fmt: skip
    dout, dlse = torch.randn_like(q), torch.randn(lse[0].shape, device=device)
    truth = torch.autograd.grad((out, lse), exact, (dout.double()[None], dlse.double()[None]))
    geo = geometry(cu_q, cu_k, len(q), len(k), c["block"])
    delta = backward.preprocess(dout, out[0].detach().to(dtype), dlse)
    return (dout, delta, q, k, v, lse[0].detach().float(), indices, geo, spec, nslots), truth


def assert_close(grads, truth, dtype):
    for x, y in zip(grads, truth, strict=True):
        assert x.dtype == dtype and x.isfinite().all()
        assert (x.double() - y).abs().max() <= BOUND[dtype] * max(1.0, y.abs().max().item())


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that short lists run through every loop of a kernel."""
    real = configs.get

    def get(kernel, *key):
        tiles = {"BLOCK_M": 32, "BLOCK_N": 16} if kernel.startswith("moba.dq") or kernel == "moba.dkv" else {}
        return real(kernel, *key) | tiles

    monkeypatch.setattr(configs, "get", get)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, dtype, device):
    given, truth = problem(name, dtype, device)
    assert_close(backward.backward_stages(*given), truth, dtype)


def test_segments_change_nothing(device, monkeypatch):
    given, truth = problem("plain", torch.float32, device)
    whole = backward.backward_stages(*given)
    assert all(x.equal(y) for x, y in zip(whole, backward.backward_stages(*given), strict=True))
    spec = given[8]._replace(workspace_bytes=20 * 2 * 2 * 32 * 4)
    parts = backward.backward_stages(*given[:8], spec, given[9])
    assert all(x.equal(y) for x, y in zip(whole, parts, strict=True))


def test_several_lists_of_pairs(device, monkeypatch):
    given, truth = problem("odd_block_extras", torch.float16, device)
    monkeypatch.setattr(backward, "MAX_PAIRS", 20 * 2 * given[9].total)
    assert_close(backward.backward_stages(*given), truth, torch.float16)


def test_replayed_holes_and_rows_without_keys(device):
    """Slots of -1 anywhere, and rows whose lse is -inf, contribute nothing and leave nothing unwritten."""
    given, _ = problem("plain", torch.float32, device)
    holes = given[6].clone()
    holes[::2, :, 1:] = -1
    dq, dk, dv = backward.backward_stages(*given[:6], holes, *given[7:])
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    empty = torch.full_like(given[5], -torch.inf)
    assert all(x.eq(0).all() for x in backward.backward_stages(*given[:5], empty, *given[6:]))
