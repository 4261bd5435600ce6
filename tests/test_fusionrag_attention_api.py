"""`selective_attention`: errors, dispatch, registration with torch, gradients."""

import pytest
import torch

import attnlab
from attnlab.fusionrag import attention, future_share
from attnlab.kernels.fusionrag import portable
from attnlab.rope import DynamicScaling, RopeConfig, shift_rope
from attnlab.testing import assert_accurate, gaussian, plain_attention, ragged

Q, K, V = gaussian(2, 5, 16, 4, 2, 8)
AT = torch.tensor([[3, 15, 0, -1, 7], [15, 3, 3, 9, 0]])
ROPE = RopeConfig(10000.0, 8)
ROPES = {"": None, "turned": ROPE, "interleaved": RopeConfig(10000.0, 8, rotary_dim=6, interleaved=True)}
SHIFT = torch.arange(32).view(2, 16)
LENGTHS = torch.tensor([16, 16], dtype=torch.int32)
TABLE = torch.arange(8, dtype=torch.int32).view(2, 4)
PAGES = dict(k=K.reshape(8, 4, 2, 8), v=V.reshape(8, 4, 2, 8), page_table=TABLE, lengths=LENGTHS)
BACKENDS = ["reference", "portable", "cpu"]


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


def changed(x, at, value):
    x = x.clone()
    x[at] = value
    return x


def packs(cu_q, cu_k, at=AT[:1], **options):
    return dict(q=Q[:1], k=K[:1], v=V[:1], positions=at, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)


BAD = [
    (dict(q=Q[0]), ValueError, "q must have shape [B, T, H, D], got [5, 4, 8]"),
    (dict(k=K[:1]), ValueError, "k must have q's batch size 2, got 1"),
    (dict(k=K.half()), TypeError, "k must have q's dtype float32, got float16"),
    (dict(v=V[:, :8]), ValueError, "v must have k's shape [2, 16, 2, 8], got [2, 8, 2, 8]"),
    (dict(q=Q[:, :, :3]), ValueError, "q's heads must be a multiple of k's heads 2, got 3"),
    (dict(positions=[1, 2]), TypeError, "positions must be an int32 or int64 Tensor, got list"),
    (dict(positions=AT.float()), TypeError, "positions must be an int32 or int64 Tensor, got torch.float32"),
    (dict(positions=AT > 3), TypeError, "positions must be an int32 or int64 Tensor, got torch.bool"),
    (dict(positions=AT[0]), ValueError, "positions must have shape [2, 5], got [5]"),
    (dict(positions=AT.to("meta")), ValueError, "positions must be on q's device cpu, got meta"),
    (
        dict(positions=changed(AT, (1, 2), 16)),
        ValueError,
        "positions[1, 2] must be -1 or below its row's length 16, got 16",
    ),
    (
        dict(positions=changed(AT, (0, 4), -2)),
        ValueError,
        "positions[0, 4] must be -1 or below its row's length 16, got -2",
    ),
    (dict(positions=changed(AT, (0, 1), 1 << 40)), ValueError, "positions[0, 1] must be -1 or below"),
    (dict(lengths=cu(16, 9)), ValueError, "positions[1, 0] must be -1 or below its row's length 9, got 15"),
    (dict(lengths=cu(16, 17)), ValueError, "lengths must be in 0..16 (the room of a row), got [16, 17]"),
    (dict(lengths=cu(-1, 16)), ValueError, "lengths must be in 0..16 (the room of a row), got [-1, 16]"),
    (dict(lengths=LENGTHS.long()), TypeError, "lengths must be an int32 Tensor, got torch.int64"),
    (dict(lengths=16), TypeError, "lengths must be an int32 Tensor, got int"),
    (dict(lengths=cu(16)), ValueError, "lengths must have shape [2], got [1]"),
    (dict(page_table=TABLE), ValueError, "page_table needs lengths, the number of keys of each row"),
    (PAGES | dict(page_table=TABLE.long()), TypeError, "page_table must be an int32 Tensor, got torch.int64"),
    (PAGES | dict(page_table=TABLE[0]), ValueError, "page_table must have shape [2, 4], got [4]"),
    (PAGES | dict(page_table=TABLE[:1]), ValueError, "page_table must have shape [2, 4], got [1, 4]"),
    (
        PAGES | dict(page_table=changed(TABLE, (1, 3), 8)),
        ValueError,
        "page_table[1, 3] must be in 0..7, got 8",
    ),
    (
        PAGES | dict(page_table=changed(TABLE, (0, 0), -1)),
        ValueError,
        "page_table[0, 0] must be in 0..7, got -1",
    ),
    (PAGES | dict(lengths=cu(17, 16)), ValueError, "lengths must be in 0..16 (the room of a row), got [17, 16]"),
    (PAGES | dict(k=K[0]), ValueError, "k must have shape [pages, page_size, H, D], got [16, 2, 8]"),
    (
        PAGES | dict(k=K[:, :0], v=V[:, :0]),
        ValueError,
        "k must have a page_size of at least 1, got [2, 0, 2, 8]",
    ),
    (PAGES | dict(q=Q.clone().requires_grad_()), ValueError, "with a page_table there are no gradients"),
    (dict(shift=SHIFT), ValueError, "shift and rope must be given together"),
    (dict(rope=ROPE), ValueError, "shift and rope must be given together"),
    (dict(shift=SHIFT, rope=10000.0), TypeError, "rope must be a RopeConfig, got float"),
    (
        dict(shift=SHIFT, rope=RopeConfig(1e4, 8, scaling=DynamicScaling(2.0, 8))),
        ValueError,
        "rope must not scale dynamically",
    ),
    (
        dict(shift=SHIFT, rope=RopeConfig(1e4, 16)),
        ValueError,
        "rope must have q's head size 8, got head_dim=16",
    ),
    (dict(shift=3, rope=ROPE), TypeError, "shift must be an int32 or int64 Tensor, got int"),
    (dict(shift=SHIFT.float(), rope=ROPE), TypeError, "shift must be an int32 or int64 Tensor, got torch.float32"),
    (dict(shift=SHIFT[:1], rope=ROPE), ValueError, "shift must have shape [2, 16], got [1, 16]"),
    (dict(shift=SHIFT[:, :9], rope=ROPE), ValueError, "shift must cover the 16 keys of a row, got [2, 9]"),
    (
        dict(shift=SHIFT[:, :9], rope=ROPE, lengths=LENGTHS),
        ValueError,
        "shift must cover the longest row's 16 keys, got 9",
    ),
    (packs(cu(0, 5), cu(0, 16), shift=SHIFT[:1, :9], rope=ROPE), ValueError, "shift must have shape [1, 16]"),
    (packs(cu(0, 5), None), ValueError, "cu_seqlens_q and cu_seqlens_k must be given together"),
    (dict(cu_seqlens_q=cu(0, 5), cu_seqlens_k=cu(0, 16)), ValueError, "packed sequences need a batch size of 1, got 2"),
    (packs(cu(0, 4), cu(0, 16)), ValueError, "cu_seqlens_q must end at 5 (the number of tokens), got 4"),
    (packs(cu(0, 5), cu(0, 12)), ValueError, "cu_seqlens_k must end at 16 (the number of tokens), got 12"),
    (
        packs(cu(0, 1, 5), cu(0, 4, 16)),
        ValueError,
        "positions[0, 1] must be -1 or below its row's length 12, got 15",
    ),
    (packs(cu(0, 5), cu(0, 16), lengths=cu(16)), ValueError, "lengths and cu_seqlens_k exclude each other"),
    (
        packs(cu(0, 5), cu(0, 16), lengths=cu(16), page_table=TABLE[:1]),
        ValueError,
        "page_table and cu_seqlens_k exclude each other",
    ),
    (dict(mask="causal"), ValueError, "mask must be 'exact' or 'bottom_right', got 'causal'"),
    (dict(scale="1"), TypeError, "scale must be a number or None, got str"),
    (dict(return_lse=1), TypeError, "return_lse must be a bool, got 1"),
    (dict(backend="fast"), ValueError, "backend must be one of 'auto', 'triton', "),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:60] for _, _, m in BAD])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(change, error, message, backend):
    with pytest.raises(error) as caught:
        attnlab.selective_attention(**dict(q=Q, k=K, v=V, positions=AT, backend=backend) | change)
    assert str(caught.value).startswith("selective_attention: ") and message in str(caught.value)


@pytest.mark.parametrize(
    "positions, length, error, message",
    [
        ([1], 4, TypeError, "positions must be an int32 or int64 Tensor, got list"),
        (AT.float(), 16, TypeError, "positions must be an int32 or int64 Tensor, got torch.float32"),
        (AT[None], 16, ValueError, "positions must have shape [nnz] or [B, nnz], got [1, 2, 5]"),
        (AT, 15, ValueError, "positions must be -1 or in 0..14, got values in -1..15"),
        (AT - 1, 16, ValueError, "positions must be -1 or in 0..15, got values in -2..14"),
        (AT, -1, ValueError, "length must be a non-negative int, got -1"),
    ],
)
def test_bad_input_of_future_share(positions, length, error, message):
    with pytest.raises(error) as caught:
        future_share(positions, length)
    assert str(caught.value) == f"future_share: {message}"


def test_values_are_checked_once_until_they_change(monkeypatch):
    checks = []
    real = attention.remember
    monkeypatch.setattr(attention, "remember", lambda *args: checks.append(args) or real(*args))
    at, lengths, table = AT.clone(), LENGTHS.clone(), TABLE.clone()

    def attend(**change):
        paged = PAGES | dict(page_table=table, lengths=lengths)
        attnlab.selective_attention(**dict(q=Q, positions=at, backend="portable") | paged | change)

    for _ in range(3):
        attend()
    assert len(checks) == 1
    table[0, 0] = 7
    attend()
    attend(lengths=lengths.clone())
    assert len(checks) == 3
    lengths[0] = 9
    with pytest.raises(ValueError, match=r"positions\[0, 1\] must be"):
        attend()
    lengths[0], table[1, 1] = 16, 99
    with pytest.raises(ValueError, match=r"page_table\[1, 1\] must be"):
        attend()
    table[1, 1], at[0, 0] = 5, 16
    with pytest.raises(ValueError, match=r"positions\[0, 0\] must be"):
        attend()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"positions\[0, 0\] must be"):
        attend()


def test_explain_and_refusals():
    given = (Q.double(), K.double(), V.double(), AT)
    assert attnlab.explain(attnlab.selective_attention, *given).chosen == "portable"
    if not torch.cuda.is_available():
        with pytest.raises(attnlab.BackendError) as caught:
            attnlab.selective_attention(*given, backend="triton")
        text = str(caught.value)
        assert all(f"\n  {name}: " in text for name in attention.BACKENDS) and "dtype float64 is not one of" in text


def loss(found):
    out, lse = found
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return (out * weight).sum() + (lse.masked_fill(lse.isinf(), 0.0) * weight[..., 0]).sum()


PROBLEMS = {
    "batch": (AT, {}),
    "bottom_right": (AT, dict(mask="bottom_right")),
    "ragged bottom_right": (changed(AT, (AT > 9), -1), dict(lengths=cu(16, 10), mask="bottom_right")),
    "ragged batch": (changed(AT, (AT > 9), -1), dict(lengths=cu(16, 10))),
    "pack": (
        torch.tensor([[3, 4, 0, 0, -1, 10, 2, 2, 7, 5]]),
        dict(zip(("cu_seqlens_q", "cu_seqlens_k"), ragged([4, 0, 5, 1], [5, 6, 11, 10]), strict=True)),
    ),
}


def problem(name, dtype=torch.float32, turned=""):
    """q, k, v, positions and options; keys past their row's length are NaN."""
    at, options = PROBLEMS[name]
    q, k, v = (x.to(dtype).clone() for x in (Q, K, V))
    if name == "pack":
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    elif "lengths" in options:
        k[1, 10:] = v[1, 10:] = torch.nan
    if turned:
        options = options | dict(shift=SHIFT.view(k.shape[:2]) * 37, rope=ROPES[turned])
    return [x.requires_grad_() for x in (q, k, v)], at, options


@pytest.mark.parametrize("turned", ROPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_are_those_of_the_reference(name, turned):
    x, at, options = problem(name, torch.float64, turned)

    def grads(backend):
        found = attnlab.selective_attention(*x, at, return_lse=True, backend=backend, **options)
        return found, torch.autograd.grad(loss(found), x)

    for a, b in zip(grads("portable"), grads("reference"), strict=True):
        for got, want in zip(a, b, strict=True):
            # The reference turns with float64 frequencies throughout, as the portable backend does in float64.
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("turned", ROPES)
@pytest.mark.parametrize("name", ["batch", "pack"])
def test_gradcheck(name, turned):
    x, at, options = problem(name, torch.float64, turned)

    def fn(*x):
        out, lse = attnlab.selective_attention(*x, at, return_lse=True, backend="portable", **options)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(fn, x, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: fn(*x)[0], x, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: fn(*x)[1], x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_in_other_dtypes(backend, name, dtype):
    """Of the portable backend, whichever ran forward."""
    rounded = [t.detach().to(dtype) for t in problem(name)[0]]
    found = []
    for kind, who in ((torch.float64, "reference"), (dtype, "reference"), (dtype, backend)):
        x, at, options = [t.to(kind).requires_grad_() for t in rounded], *problem(name)[1:]
        out = attnlab.selective_attention(*x, at, return_lse=True, backend=who, **options)
        found.append(torch.autograd.grad(loss([t.double() for t in out]), x))
    for what, truth, plain, got in zip(("dq", "dk", "dv"), *found, strict=True):
        assert got.dtype == dtype
        assert_accurate(got, truth, plain, roundings=8, what=what)


def test_gradients_of_small_tiles(monkeypatch):
    """Every kind of block of a longer problem."""
    q, k, v = (x.requires_grad_() for x in gaussian(1, 60, 200, 4, 2, 8, dtype=torch.float64))
    at = torch.randint(-1, 200, (1, 60), generator=torch.Generator().manual_seed(3))
    want = loss(plain_attention(q, k, v, torch.arange(200) <= at[0, :, None]))
    monkeypatch.setattr(portable, "CHUNK_ROWS", 32)
    monkeypatch.setattr(portable, "SPLIT_WORK", 2000)
    got = loss(attnlab.selective_attention(q, k, v, at, return_lse=True, backend="portable"))
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    def run():
        x, at, options = problem("pack", turned="turned")
        out = attnlab.selective_attention(*x, at, backend=backend, **options)
        return out, *(torch.autograd.grad(out.sum(), x) if backend != "reference" else ())

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_opcheck(backend):
    op = torch.ops.attnlab.selective_attention
    q, k, v = (x.flatten(0, 1).clone().requires_grad_() for x in (Q, K, V))
    steps = cu(0, 5, 10), cu(0, 16, 32)
    angles = SHIFT.flatten()[:, None] * ROPE.inverse_frequencies()
    for lengths, cos, sin in ((None, None, None), (LENGTHS, angles.cos(), angles.sin())):
        tail = (16, 16, False, 0.3, False, False, backend)
        torch.library.opcheck(op, (q, k, v, AT, *steps, None, lengths, cos, sin, *tail))
    pools = PAGES["k"], PAGES["v"]
    torch.library.opcheck(op, (q.detach(), *pools, AT, *steps, TABLE, LENGTHS, None, None, *tail))


def test_opcheck_of_backward():
    q, k, v = (x.flatten(0, 1) for x in (Q, K, V))
    steps = cu(0, 5, 10), cu(0, 16, 32)
    angles = SHIFT.flatten()[:, None] * ROPE.inverse_frequencies()
    op = torch.ops.attnlab.selective_attention_backward
    for dlse, lengths, turns in ((None, None, (None, None)), (q[..., 0], LENGTHS, (angles.cos(), angles.sin()))):
        given = (q, dlse, q, k, v, q, q[..., 0].abs() + 9, AT, *steps, lengths, *turns, False, 0.3, False)
        torch.library.opcheck(op, given)


def test_compiles_whole_with_dynamic_lengths():
    def fn(q, k, v, at, shift):
        return attnlab.selective_attention(q, k, v, at, shift=shift, rope=ROPE, return_lse=True, backend="portable")

    compiled = torch.compile(fn, fullgraph=True, dynamic=True)
    for n, t in ((7, 30), (9, 41), (20, 64)):
        x = [y.requires_grad_() for y in gaussian(2, n, t, 4, 2, 8)]
        g = torch.Generator().manual_seed(n)
        at, shift = torch.randint(0, t, (2, n), generator=g), torch.randint(0, 99, (2, t), generator=g)
        want, found = fn(*x, at, shift), compiled(*x, at, shift)
        torch.testing.assert_close(found, want)
        grads = [torch.autograd.grad(loss(y), x) for y in (want, found)]
        torch.testing.assert_close(*grads)
        with pytest.raises(ValueError, match=r"positions\[0, 0\] must be"):
            compiled(*x, changed(at, (0, 0), t), shift)


def test_compiles_over_a_page_table():
    given = dict(q=Q, positions=AT, backend="portable") | PAGES
    compiled = torch.compile(lambda: attnlab.selective_attention(**given, return_lse=True), fullgraph=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(compiled(), attnlab.selective_attention(**given, return_lse=True), strict=True)
    )


def test_no_gradient_through_the_shift():
    x, at, options = problem("batch", torch.float64, turned="turned")
    turned = shift_rope(x[1], options["shift"], ROPE)
    want = torch.autograd.grad(loss(attnlab.selective_attention(x[0], turned, x[2], at, return_lse=True)), x)
    found = torch.autograd.grad(loss(attnlab.selective_attention(*x, at, return_lse=True, **options)), x)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_empty_calls():
    for batch, rows, keys in ((0, 3, 4), (2, 0, 4), (2, 0, 0), (2, 3, 0)):
        q, k, v = gaussian(batch, rows, keys, 4, 2, 8)
        at = torch.full((batch, rows), -1)
        for backend in BACKENDS:
            out, lse = attnlab.selective_attention(q, k, v, at, return_lse=True, backend=backend)
            assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()
