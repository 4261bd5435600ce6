"""append_token is attention over the previous keys and the new one."""

import math

import pytest
import torch

from attnlab import append_token
from attnlab.reference.states import full_attention
from attnlab.states import BACKENDS
from attnlab.testing import assert_accurate, plain_attention

HERE = [name for name in BACKENDS if name != "cuda"]


def problem(tq=1, group=1, previous=7, d=24, dtype=torch.float64, heads=8):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, tq, heads, d, generator=g).to(dtype)
    k, v = (torch.randn(2, previous, heads // group, d, generator=g).to(dtype) for _ in range(2))
    k_new, v_new = (torch.randn(2, tq, heads // group, d, generator=g).to(dtype) for _ in range(2))
    return q, k, v, k_new, v_new


def whole(q, k, v, k_new, v_new, attend):
    """Every query over all previous keys and its own new one."""
    rows = []
    for i in range(q.shape[1]):
        joined = (torch.cat([x, y[:, i : i + 1]], 1) for x, y in ((k, k_new), (v, v_new)))
        rows.append(attend(q[:, i : i + 1], *joined))
    return [torch.cat(x, 1) for x in zip(*rows, strict=True)]


def dense(q, k, v):
    return full_attention(q, k, v, causal=False)


def plain(q, k, v):
    return plain_attention(q, k, v, torch.ones((), dtype=torch.bool))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("tq, group, previous", [(1, 1, 7), (3, 2, 7), (2, 8, 1), (3, 4, 0)])
def test_is_attention_over_the_key_too(tq, group, previous, base, dtype, backend, device):
    x = [y.to(device) for y in problem(tq, group, previous, d=300 if group == 8 else 24, dtype=dtype)]
    truth = whole(*(y.double() for y in x), dense)
    near = whole(*x, plain)
    out, lse = (y.float() for y in dense(*(y.double() for y in x[:3])))
    assert previous or (lse == -math.inf).all()
    if not previous:
        out = out.fill_(math.nan)
    unit = math.log(2) if base == "2" else 1.0
    found = append_token((out, lse / unit), x[0], *x[3:], lse_base=base, backend=backend)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_accurate(found[0], truth[0], near[0], roundings=4)
    assert_accurate(found[1] * unit, truth[1], near[1], roundings=4)
    rounded = append_token((out.to(dtype), lse / unit), x[0], *x[3:], lse_base=base, backend=backend)[0]
    assert rounded.dtype == dtype
    assert_accurate(rounded, truth[0], near[0], roundings=4)


@pytest.mark.parametrize("backend", HERE)
def test_views_and_in_place(backend, device):
    q, k, v, k_new, v_new = (x.to(device) for x in problem(3, 2, dtype=torch.float32))
    state = tuple(x.float() for x in dense(q, k, v))
    want = append_token(state, q, k_new, v_new, backend=backend)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*state, q, k_new, v_new)]
    wide = [torch.stack([x, x * math.nan], -1)[..., 0] for x in (q, k_new, v_new)]
    for given in (by_head, [*state, *wide]):
        found = append_token(tuple(given[:2]), *given[2:], backend=backend)
        assert all(map(torch.equal, found, want))
    target = torch.full((2, 3, 10, 30), math.nan, device=device), torch.full((2, 10, 3), math.nan, device=device)
    to = target[0][..., 1:9, 2:26], target[1][:, 1:9].transpose(1, 2)
    found = append_token(state, q, k_new, v_new, out=to, backend=backend)
    assert found[0] is to[0] and all(map(torch.equal, to, want))
    assert target[0].isfinite().sum() == want[0].numel()
    found = append_token(state, q, k_new, v_new, out=state, backend=backend)
    assert found[1] is state[1] and all(map(torch.equal, state, want))


@pytest.mark.parametrize("backend", HERE)
def test_nan_stays_where_it_is_and_nothing_is_no_number(backend, device):
    q, k, v, k_new, v_new = (x.to(device) for x in problem(1, 2, dtype=torch.float32))
    out, lse = (x.float() for x in dense(q, k, v))
    lse[0, 0, 3], lse[1, 0, 0], out[1, 0, 0] = math.nan, math.inf, math.nan
    found = append_token((out, lse), q, k_new, v_new, backend=backend)
    bad = torch.zeros(2, 1, 8, dtype=torch.bool, device=device)
    bad[0, 0, 3] = True
    assert torch.equal(found[0].isnan().any(-1), bad) and torch.equal(found[1].isnan(), bad)
    assert torch.equal(found[0][1, 0, 0], v_new[1, 0, 0])


@pytest.mark.parametrize("backend", HERE)
def test_a_score_of_minus_infinity_is_no_key(backend, device):
    """The state is as it was, an empty one stays empty."""
    q, k, v, k_new, v_new = (x.to(device) for x in problem(1, 2, dtype=torch.float32))
    out, lse = (x.float() for x in dense(q, k, v))
    lse[0], out[0] = -math.inf, math.nan
    found = append_token((out, lse), torch.ones_like(q), torch.full_like(k_new, -math.inf), v_new, backend=backend)
    assert (found[0][0] == 0).all() and (found[1][0] == -math.inf).all()
    torch.testing.assert_close((found[0][1], found[1][1]), (out[1], lse[1]))


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("group", [1, 4])
def test_gradients(group, base, backend):
    q, k, v, k_new, v_new = problem(2, group, d=2, heads=4)
    out, lse = dense(q, k, v)
    empty = torch.zeros_like(lse, dtype=torch.bool)
    empty[0, 1, 3] = True

    def fn(out, lse, *x):
        return append_token((out, lse.masked_fill(empty, -math.inf)), *x, scale=0.3, lse_base=base, backend=backend)

    assert torch.autograd.gradcheck(fn, [x.clone().requires_grad_() for x in (out, lse, q, k_new, v_new)])


def test_gradients_of_either_result_alone():
    q, k, v, k_new, v_new = problem(2, 2)
    leaves = [x.requires_grad_() for x in (*dense(q, k, v), q, k_new, v_new)]
    for i in range(2):
        loss = append_token(tuple(leaves[:2]), *leaves[2:])[i].square().sum()
        want = append_token(tuple(leaves[:2]), *leaves[2:], backend="reference")[i].square().sum()
        found, truth = (torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in (loss, want))
        torch.testing.assert_close(found, truth)


def test_opcheck_compile_and_autocast():
    q, k, v, k_new, v_new = problem(2, 2, dtype=torch.float32)
    state = tuple(x.float() for x in dense(q, k, v))
    rows = [x.clone().requires_grad_() for x in (*state, q, k_new, v_new)]
    ops = torch.ops.attnlab
    torch.library.opcheck(ops.append_token, (*rows, 0.3, True, "portable"))
    to = [torch.empty_like(x) for x in state]
    torch.library.opcheck(ops.append_token_out, (*(x.detach() for x in rows), *to, 0.3, False, "portable"))
    want = append_token(state, q, k_new, v_new)
    compiled = torch.compile(append_token, fullgraph=True)
    assert all(map(torch.equal, compiled(state, q, k_new, v_new), want))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, append_token(state, q, k_new, v_new), want))


Q, KN = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 2, 8)
OUT, LSE = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(state=OUT), TypeError, "state must be two Tensors (out, lse), got Tensor"),
        (dict(state=(OUT[..., :4], LSE)), ValueError, "state[0] must have shape [2, 1, 4, 8], got [2, 1, 4, 4]"),
        (dict(state=(OUT, LSE[:1])), ValueError, "state[1] must have shape [2, 1, 4], got [1, 1, 4]"),
        (dict(state=(OUT, LSE.half())), TypeError, "state[1] must be torch.float32, got torch.float16"),
        (dict(state=(OUT.half(), LSE)), TypeError, "state[0] must be torch.float32, got torch.float16"),
        (dict(state=(OUT, LSE.to("meta"))), ValueError, "state[1] must be on q's device cpu, got meta"),
        (dict(state=(OUT, 3)), TypeError, "state[1] must be a floating-point Tensor"),
        (dict(k_new=KN.half()), TypeError, "k_new must have q's dtype float32, got float16"),
        (dict(v_new=KN[..., :4]), ValueError, "v_new must have q's head size 8, got 4"),
        (dict(k_new=KN.expand(2, 3, 2, 8), v_new=KN.expand(2, 3, 2, 8)), ValueError, "one key per query, 1, got 3"),
        (dict(k_new=Q[:, :, :3], v_new=Q[:, :, :3]), ValueError, "q's heads must be a multiple of k_new's heads 3"),
        (dict(k_new=KN.to("meta")), ValueError, "k_new must be on q's device cpu, got meta"),
        (dict(lse_base="e2"), ValueError, "lse_base must be 'e' or '2', got 'e2'"),
        (dict(out=(OUT[:1], LSE)), ValueError, "out[0] must have shape [2, 1, 4, 8], got [1, 1, 4, 8]"),
        (dict(out=(OUT.half(), LSE.clone())), TypeError, "out[0] must be torch.float32 or torch.float32"),
        (dict(out=(Q, torch.empty(2, 1, 4))), ValueError, "out[0] overlaps q"),
        (dict(q=Q.clone().requires_grad_(), out=(OUT, LSE)), ValueError, "with out there are no gradients"),
        (dict(scale="1"), TypeError, "scale must be a number or None, got str"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error) as caught:
        append_token(**(dict(state=(OUT, LSE), q=Q, k_new=KN, v_new=KN) | change))
    assert str(caught.value).startswith("append_token: ") and message in str(caught.value)


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_half_a_state_is_no_place(backend):
    out, lse = torch.randn(3, 1, 4, 8), torch.randn(2, 1, 4)
    with pytest.raises(ValueError, match=r"out\[0\] overlaps state\[0\], and not as a whole state"):
        append_token((out[:2], lse), Q, KN, KN, out=(out[1:], lse), backend=backend)
