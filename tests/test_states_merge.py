"""merge_states on every backend that runs here, against float64."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab import merge_states
from attnlab.dispatch import KERNEL_DTYPES
from attnlab.reference.states import merge_states as reference
from attnlab.states import BACKENDS
from attnlab.testing import assert_accurate

FP8 = torch.float8_e4m3fn
HERE = [name for name in BACKENDS if name != "cuda"]
EXACT = ["portable", "reference"]  # those that do float64


def dtypes(backend, device):
    """The interpreter is wrong in bfloat16."""
    return [x for x in KERNEL_DTYPES if x != torch.bfloat16 or backend != "triton" or device.type == "cuda"]


def shards(n, shape, d, dtype=torch.float32, seed=0, empty=0.2):
    """States with what others write for no keys, and NaN where nobody may look."""
    g = torch.Generator().manual_seed(seed)
    outs, lses = torch.randn(n, *shape, d, generator=g).to(dtype), torch.randn(n, *shape, generator=g) * 4
    kind = torch.rand(n, *shape, generator=g)
    lses = lses.masked_fill(kind < empty, -math.inf).masked_fill(kind < empty / 2, math.inf)
    return outs.masked_fill(lses.isinf()[..., None], math.nan), lses


def plain(outs, lses):
    """The merge as one writes it, in the inputs' dtype."""
    lses = lses.masked_fill(lses == math.inf, -math.inf)
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -math.inf, 0.0)).exp().to(outs.dtype)
    return (outs.masked_fill(lses.isinf()[..., None], 0.0) * weights[..., None]).sum(0), lse


def check(found, outs, lses, roundings=2.0, **options):
    """Against the reference in float64, `options` as it takes them."""
    truth = reference(outs.double(), lses.double(), **options)
    factors = options.get("factors")
    scaled = (
        lses if factors is None else torch.where(lses.isinf(), lses, lses * factors.view(-1, *[1] * (lses.ndim - 1)))
    )
    unit = math.log(2) if options.get("base2") else 1.0
    cuts = options["indptr"].tolist() if options.get("indptr") is not None else [0, len(outs)]
    parts = [plain(outs[a:b], scaled[a:b] * unit) for a, b in itertools.pairwise(cuts)]
    near = [torch.stack(x) for x in zip(*parts, strict=True)]
    near = near if options.get("indptr") is not None else [x[0] for x in near]
    assert_accurate(found[0], truth[0], near[0].to(found[0].dtype), roundings=roundings, what="out")
    assert_accurate(found[1], truth[1], near[1] / unit, roundings=roundings, what="lse")


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 64, 257])
def test_any_number_of_segments(n, backend, device):
    for dtype in dtypes(backend, device):
        outs, lses = (x.to(device) for x in shards(n, (3, 2), 24, dtype, seed=n))
        check(merge_states(outs, lses, backend=backend), outs, lses)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    "shape, d", [((1, 1, 128), 256), ((100,), 16), ((2, 3, 5), 1), ((4,), 300), ((2, 0, 3), 8), ((), 7)]
)
def test_any_heads_and_sizes(shape, d, backend, device):
    """More than 1024 vectors a token (128 heads of 256), rows enough for several tiles, none, sizes over a tile."""
    outs, lses = (x.to(device) for x in shards(3, shape, d))
    out, lse = merge_states(outs, lses, backend=backend)
    assert out.shape == (*shape, d) and lse.shape == shape
    if out.numel():
        check((out, lse), outs, lses)


def layouts():
    outs, lses = shards(3, (2, 6, 4), 16, seed=1)
    head_first = lses.transpose(2, 3).contiguous().transpose(2, 3)
    yield "head-first lse", outs, head_first
    yield "head-first outs", outs.transpose(2, 3).contiguous().transpose(2, 3), lses
    yield "sliced heads", outs.repeat(1, 1, 1, 2, 1)[:, :, :, 1:5], lses.repeat(1, 1, 1, 2)[..., 1:5]
    yield "sliced size", outs.repeat(1, 1, 1, 1, 2)[..., 3:19], lses
    yield "shards inside", outs.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4), lses
    yield "sparse last", torch.stack([outs, outs * math.nan], -1)[..., 0], lses
    yield "one token", outs[:, :, :1], head_first[:, :, :1]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name, outs, lses", list(layouts()), ids=lambda x: x if isinstance(x, str) else "")
def test_views(name, outs, lses, backend, device):
    outs, lses = outs.to(device), lses.to(device)
    check(merge_states(outs, lses, backend=backend), outs, lses)
    target = (
        torch.full((*outs.shape[1:-2], 9, 20), math.nan, device=device),
        torch.full((9, *outs.shape[1:-2]), math.nan),
    )
    to = target[0][..., 2 : 2 + outs.shape[-2], 3:19], target[1].to(device)[1 : 1 + outs.shape[-2]].permute(1, 2, 0)
    found = merge_states(outs, lses, out=to, backend=backend)
    assert found[0] is to[0] and found[1] is to[1]
    check(found, outs, lses)
    assert target[0].isfinite().sum() == to[0].numel()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("counts", [[0, 3, 1, 0, 5, 0], [0, 0, 0], [4], [70, 0, 2], []])
def test_runs_of_entries(counts, base, backend, device):
    """Empty rows first, last, in between, all of them, and no rows at all."""
    outs, lses = (x.to(device) for x in shards(sum(counts), (2, 3), 16, seed=3))
    indptr = torch.tensor([0, *counts], device=device).cumsum(0)
    factors = torch.rand(len(outs), device=device) + 0.5
    for kind in (torch.int32, torch.int64):
        found = merge_states(outs, lses, indptr=indptr.to(kind), lse_base=base, temperature=factors, backend=backend)
        assert found[0].shape == (len(counts), 2, 3, 16)
        if counts:
            check(found, outs, lses, indptr=indptr, base2=base == "2", factors=factors)
    lengths = torch.tensor(counts)
    assert (found[1][lengths == 0] == -math.inf).all() and (found[0][lengths == 0] == 0).all()


@pytest.mark.parametrize("backend", HERE)
def test_base_2_is_not_base_e(backend, device):
    """The lse of another's base is the classic fault: weights are finite, sum to 1 and are wrong."""
    outs, lses = (x.to(device) for x in shards(4, (5, 2), 16, empty=0))
    right = merge_states(outs, lses, backend=backend)
    two = merge_states(outs, lses / math.log(2), lse_base="2", backend=backend)
    torch.testing.assert_close(two[0], right[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two[1] * math.log(2), right[1], rtol=1e-5, atol=1e-6)
    assert (merge_states(outs, lses / math.log(2), backend=backend)[0] - right[0]).abs().max() > 0.05


@pytest.mark.parametrize("backend", HERE)
def test_factors(backend, device):
    outs, lses = (x.to(device) for x in shards(5, (6, 3), 16, empty=0.4))
    scale, temperature = torch.rand(2, 5, device=device) + 0.5
    found = merge_states(outs, lses, lse_scale=scale, temperature=temperature, backend=backend)
    check(found, outs, lses, factors=scale * temperature)
    found = merge_states(outs, lses, lse_scale=0.7, temperature=scale.double(), backend=backend)
    check(found, outs, lses, factors=scale * 0.7)
    found = merge_states(outs, lses, lse_scale=2, temperature=0.5, backend=backend)
    assert all(map(torch.equal, found, merge_states(outs, lses, backend=backend)))


@pytest.mark.parametrize("backend", HERE)
def test_nothing_and_not_a_number(backend, device):
    outs, lses = torch.full((3, 4, 2, 8), math.nan, device=device), torch.full((3, 4, 2), -math.inf, device=device)
    lses[1] = math.inf
    out, lse = merge_states(outs, lses, lse_scale=3.0, backend=backend)
    assert (out == 0).all() and (lse == -math.inf).all()
    outs, lses = (x.to(device) for x in shards(3, (4, 2), 8, empty=0))
    lses[1, 2, 1] = math.nan
    out, lse = merge_states(outs, lses, backend=backend)
    bad = torch.zeros(4, 2, dtype=torch.bool, device=device)
    bad[2, 1] = True
    assert torch.equal(out.isnan().all(-1), bad) and torch.equal(lse.isnan(), bad)


@pytest.mark.parametrize("backend", HERE)
def test_a_weight_that_underflows_is_not_read(backend, device):
    outs, lses = torch.ones(2, 3, 8, device=device), torch.zeros(2, 3, device=device)
    lses[1], outs[1] = -5e3, math.nan
    assert (merge_states(outs, lses, backend=backend)[0] == 1).all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_in_place(n, backend, device):
    """Each shard in turn, a row in several parts of its size; the others stay as they are."""
    for i in {0, n // 2, n - 1}:
        outs, lses = (x.to(device) for x in shards(n, (3, 2), 300, seed=i))
        want = merge_states(outs, lses, backend=backend)
        kept = outs.clone(), lses.clone()
        found = merge_states(outs, lses, out=(outs[i], lses[i]), backend=backend)
        assert all(map(torch.equal, found, want))
        for x, y, z in zip((outs, lses), kept, want, strict=True):
            assert torch.equal(x[i], z)
            rest = [j for j in range(n) if j != i]
            torch.testing.assert_close(x[rest], y[rest], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["portable", "reference"])  # where the op looks, and where there is none
def test_overlaps_are_refused(backend):
    merge_states = functools.partial(attnlab.merge_states, backend=backend)
    room, lses = torch.randn(4, 6, 8), torch.randn(3, 5)
    outs = room[:3, :5]
    for out in (room[:1, 1:6][0], room[1, 1:6], room.view(-1)[4 : 4 + 40].view(5, 8)):
        with pytest.raises(ValueError, match=r"out\[0\] overlaps outs"):
            merge_states(outs, lses, out=(out, torch.empty(5)))
    with pytest.raises(ValueError, match=r"out\[1\] overlaps lses"):
        merge_states(outs, lses, out=(torch.empty(5, 8), lses.view(-1)[1:6]))
    with pytest.raises(ValueError, match="two elements in one place"):
        merge_states(outs, lses, out=(torch.empty(5, 8), torch.empty(1).expand(5)))
    with pytest.raises(ValueError, match=r"out\[0\] overlaps outs"):
        merge_states(outs[:, 0], lses[:, 0], indptr=torch.tensor([0, 3]), out=(outs[:1, 0], torch.empty(1)))
    twice = outs[:1].expand(3, 5, 8)  # a shard's memory is another's
    with pytest.raises(ValueError, match=r"out\[0\] overlaps outs"):
        merge_states(twice, lses, out=(twice[0], torch.empty(5)))
    packed = torch.randn(4, 5, 9)  # lse and out of a row side by side, other rows of the same memory: no overlap
    want = merge_states(packed[:3, :, :8], packed[:3, :, 8])
    found = merge_states(packed[:3, :, :8], packed[:3, :, 8], out=(packed[3, :, :8], packed[3, :, 8]))
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("scale", [1.0, 0.004, "tensor"])
def test_8_bits(scale, backend, device):
    """As PyTorch converts the exact result, to one step; what is too large saturates."""
    outs, lses = (x.to(device) for x in shards(3, (40,), 16, empty=0.3))
    outs[0, 0], lses[0, 0] = 1e9, 50.0
    lses[:, 1] = -math.inf
    scale = torch.tensor([[0.02]], device=device) if scale == "tensor" else scale
    out, _ = merge_states(outs, lses, out_dtype=FP8, out_scale=scale, backend=backend)
    assert out.dtype == FP8 and (out[0].float() == 448).all() and (out[1].float() == 0).all()
    exact = reference(outs.double(), lses.double())[0] / (
        float(scale) if isinstance(scale, float) else scale.double()[0]
    )
    want = exact.clamp(-448, 448).float().to(FP8)
    codes = [x.view(torch.uint8).int() for x in (out, want)]
    signed = [torch.where(x > 127, 128 - x, x) for x in codes]
    assert (signed[0] - signed[1]).abs().max() <= 1
    assert (signed[0] != signed[1]).float().mean() < 0.02
    to = torch.empty(40, 16, dtype=FP8, device=device), torch.empty(40, device=device)
    found = merge_states(outs, lses, out=to, out_scale=scale, backend=backend)
    assert found[0] is to[0] and torch.equal(to[0].view(torch.uint8), out.view(torch.uint8))


@pytest.mark.parametrize("backend", HERE)
def test_8_bits_round_as_pytorch_does(backend, device):
    """One shard is its own merge: every code, every tie, the smallest numbers."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    near = codes[:127]
    x = torch.cat([codes, (near[:-1] + near[1:]) / 2, near * 1.01, near * 0.99, torch.tensor([464.0, 1e30, math.inf])])
    x = torch.cat([x, -x[:-1]])
    x = torch.cat([x, x.new_zeros(-len(x) % 256)]).view(-1, 256).to(device)
    out, _ = merge_states(x[None], torch.zeros(1, len(x), device=device), out_dtype=FP8, out_scale=1.0, backend=backend)
    torch.testing.assert_close(out.float(), x.clamp(-448, 448).to(FP8).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", HERE)
def test_other_result_dtypes(backend, device):
    outs, lses = (x.to(device) for x in shards(3, (5, 2), 8, torch.float16))
    for dtype in dtypes(backend, device):
        out, lse = merge_states(outs, lses, out_dtype=dtype, backend=backend)
        assert out.dtype == dtype and lse.dtype == torch.float32
        check((out, lse), outs, lses)


segments = st.lists(
    st.tuples(st.floats(-60, 60), st.booleans(), st.integers(0, 2**31)), min_size=2, max_size=9
)  # fmt: skip


def drawn(parts, dtype=torch.float32):
    lses = torch.tensor([-math.inf if empty else lse for lse, empty, _ in parts], dtype=dtype)[:, None]
    outs = torch.stack([torch.randn(1, 4, generator=torch.Generator().manual_seed(s)).to(dtype) for *_, s in parts])
    return outs.masked_fill(lses.isinf()[..., None], math.nan), lses


@pytest.mark.parametrize("backend", HERE)
@given(parts=segments, data=st.data())
@settings(max_examples=8)
def test_any_bracketing_and_any_order(backend, parts, data):
    outs, lses = drawn(parts)
    truth = reference(outs.double(), lses.double())
    states = list(zip(outs, lses, strict=True))
    states = [states[i] for i in data.draw(st.permutations(range(len(states))))]
    while len(states) > 1:
        i = data.draw(st.integers(0, len(states) - 2))
        width = data.draw(st.integers(2, len(states) - i))
        some = zip(*states[i : i + width], strict=True)
        states[i : i + width] = [merge_states(*(list(x) for x in some), backend=backend)]
    near = plain(outs, lses)
    for found, want, x in zip(states[0], truth, near, strict=True):
        assert_accurate(found, want, x, roundings=2 * len(parts))


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(
    "options", [{}, {"lse_base": "2"}, {"lse_scale": 0.6, "temperature": torch.tensor([1.0, 2, 3, 0.5])}]
)
@pytest.mark.parametrize("runs", [None, [0, 0, 3, 3, 4]])
def test_gradients(runs, options, backend):
    outs, lses = (x.double() for x in shards(4, (2, 2), 2, empty=0))
    lses[1, 0], lses[:, 1, 1] = -math.inf, math.inf
    outs = outs.masked_fill(lses.isinf()[..., None], 3.0).requires_grad_()
    live, empty = lses.masked_fill(lses.isinf(), 0.0).requires_grad_(), lses.isinf()
    indptr = None if runs is None else torch.tensor(runs)

    def fn(outs, live):
        lses = torch.where(empty, -math.inf, live)
        out, lse = merge_states(outs, lses, indptr=indptr, backend=backend, **options)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(fn, (outs, live))


@pytest.mark.parametrize("backend", [x for x in HERE if x not in EXACT])
@pytest.mark.parametrize("runs", [None, [0, 0, 3, 3, 4]])
@pytest.mark.parametrize("base", ["e", "2"])
def test_gradients_of_kernels(base, runs, backend, device):
    outs, lses = (x.to(device) for x in shards(4, (3, 3), 300))
    indptr = None if runs is None else torch.tensor(runs, device=device)
    grads = []
    for other, dtype in ((backend, torch.float32), ("portable", torch.float64), ("portable", torch.float32)):
        x = [y.to(dtype).requires_grad_() for y in (outs, lses)]
        out, lse = merge_states(*x, indptr=indptr, lse_base=base, lse_scale=0.8, backend=other)
        loss = (out * out.detach().cos()).sum() + lse.masked_fill(lse == -math.inf, 0.0).sin().sum()
        grads.append(torch.autograd.grad(loss, x))
    for found, truth, near in zip(*grads, strict=True):
        assert_accurate(found, truth, near, roundings=4)
    assert not grads[0][0][lses.isinf()].any() and not grads[0][1][lses.isinf()].any()


def test_a_result_that_is_not_used_has_no_gradient():
    outs, lses = (x.requires_grad_() for x in shards(3, (2,), 4, empty=0))
    for i in range(2):
        found = torch.autograd.grad(merge_states(outs, lses)[i].sum(), (outs, lses), allow_unused=True)
        assert all(x.isfinite().all() for x in found if x is not None)


def test_sequences_are_stacked():
    outs, lses = shards(3, (4, 2), 8)
    want = merge_states(outs, lses)
    assert all(map(torch.equal, merge_states(list(outs), tuple(lses)), want))
    with pytest.raises(ValueError, match=r"outs\[1\] must have the shape"):
        merge_states([outs[0], outs[1, :1]], list(lses[:2]))
    with pytest.raises(TypeError, match=r"outs\[1\] must have the dtype"):
        merge_states([outs[0], outs[1].half()], list(lses[:2]))


@pytest.mark.parametrize("backend", HERE)
def test_reruns_are_bitwise_equal(backend, device):
    outs, lses = (x.to(device) for x in shards(9, (12, 3), 32))
    indptr = torch.tensor([0, 2, 9], device=device)
    for options in ({}, {"indptr": indptr}):
        a, b = (merge_states(outs, lses, backend=backend, **options) for _ in range(2))
        assert all(map(torch.equal, a, b))


def test_compiles_whole():
    outs, lses = shards(3, (4, 2), 8)
    indptr, factors = torch.tensor([0, 1, 3]), torch.tensor([1.0, 2.0, 3.0])

    def fn(outs, lses, *to):
        a = merge_states(outs, lses, lse_scale=factors)
        b = merge_states(outs, lses, indptr=indptr, lse_base="2")
        merge_states(outs, lses, out=to)
        return *a, *b, *to

    compiled = torch.compile(fn, fullgraph=True)
    found, want = (f(outs, lses, torch.zeros(4, 2, 8), torch.zeros(4, 2)) for f in (compiled, fn))
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("backend", HERE)
def test_autocast_changes_nothing(backend):
    outs, lses = shards(3, (4, 2), 8)
    want = merge_states(outs, lses, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = merge_states(outs, lses, backend=backend)
    assert all(map(torch.equal, found, want))


def test_opcheck():
    ops = torch.ops.attnlab
    outs, lses = (x.requires_grad_() for x in shards(3, (5,), 8, empty=0))
    for runs, factors in ((None, None), (torch.tensor([0, 2, 3]), torch.tensor([1.0, 2.0, 3.0]))):
        options = (runs, factors, None, 0.5, True)
        torch.library.opcheck(ops.merge_states, (outs, lses, *options, torch.float32, None, "portable"))
        to = (torch.empty(5, 8), torch.empty(5)) if runs is None else (torch.empty(2, 5, 8), torch.empty(2, 5))
        torch.library.opcheck(ops.merge_states_out, (outs.detach(), lses.detach(), *to, *options, None, "portable"))


def test_portable_blocks(monkeypatch):
    """Blocks smaller than a row's entries, and of several rows."""
    from attnlab.kernels.states import portable_merge

    outs, lses = shards(40, (3,), 8, torch.float64)
    lses = lses.double()
    indptr = torch.tensor([0, 0, 1, 3, 4, 30, 30, 30, 40])
    dense = shards(4, (50,), 8)
    want = merge_states(outs, lses, indptr=indptr), merge_states(*dense)
    monkeypatch.setattr(portable_merge, "BLOCK", 5 * 24)
    found = merge_states(outs, lses, indptr=indptr), merge_states(*dense)
    for a, b in zip((x for pair in found for x in pair), (x for pair in want for x in pair), strict=True):
        torch.testing.assert_close(a, b)
    truth = reference(outs, lses, indptr=indptr)
    torch.testing.assert_close(found[0], truth)


O, L = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2)
TO = torch.empty(4, 2, 8), torch.empty(4, 2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(outs=O.double()), TypeError, "lses must be float32 (float64 with float64 outs), got torch.float32"),
        (dict(lses=L.half()), TypeError, "lses must be float32"),
        (dict(outs=O.int()), TypeError, "outs must be a floating-point Tensor"),
        (dict(outs=O.to(FP8)), TypeError, "of 16 bits or more, got torch.float8_e4m3fn"),
        (dict(outs=3), TypeError, "outs must be a floating-point Tensor of 16 bits or more, got int"),
        (dict(outs=[]), ValueError, "outs must hold at least one tensor"),
        (dict(lses=L.to("meta")), ValueError, "lses must be on the device of outs cpu, got meta"),
        (dict(lses=L[:2]), ValueError, "outs must have shape [N, ..., D]"),
        (dict(outs=O[:0], lses=L[:0]), ValueError, "with N, D >= 1"),
        (dict(outs=O[..., :0]), ValueError, "with N, D >= 1"),
        (dict(lse_base="10"), ValueError, "lse_base must be 'e' or '2', got '10'"),
        (dict(lse_base=2), ValueError, "lse_base must be 'e' or '2', got 2"),
        (dict(indptr=[0, 3]), TypeError, "indptr must be an int32 or int64 Tensor, got list"),
        (dict(indptr=torch.tensor([0.0, 3.0])), TypeError, "indptr must be an int32 or int64 Tensor"),
        (dict(indptr=torch.zeros(1, 2).int()), ValueError, "indptr must have shape [rows + 1], got [1, 2]"),
        (dict(indptr=torch.tensor([0, 3], device="meta")), ValueError, "indptr must be on the device of outs"),
        (dict(indptr=torch.tensor([0, 2, 1, 3])), ValueError, "indptr must start at 0 and never fall, got [0, 2,"),
        (dict(indptr=torch.tensor([1, 3])), ValueError, "indptr must start at 0"),
        (dict(indptr=torch.tensor([0, 2])), ValueError, "indptr must end at 3 (the number of entries), got 2"),
        (dict(lse_scale=0), ValueError, "lse_scale must be positive and finite, got 0"),
        (dict(temperature=math.nan), ValueError, "temperature must be positive and finite, got nan"),
        (dict(temperature=True), TypeError, "temperature must be a number, a Tensor or None, got bool"),
        (dict(lse_scale=torch.tensor([1.0, -1.0, 1.0])), ValueError, "lse_scale[1] must be positive"),
        (dict(temperature=torch.tensor([1.0, 1.0, math.inf])), ValueError, "temperature[2] must be positive"),
        (dict(lse_scale=torch.ones(2)), ValueError, "lse_scale must have shape [3] (one per shard), got [2]"),
        (dict(lse_scale=torch.ones(3).int()), TypeError, "lse_scale must be a floating-point Tensor"),
        (dict(lse_scale=torch.ones(3, requires_grad=True)), ValueError, "lse_scale must not require gradients"),
        (dict(out_dtype=torch.float64), TypeError, "out_dtype must be one of float32, float16, bfloat16,"),
        (dict(out_dtype=FP8), ValueError, "out_scale goes with float8_e4m3fn results and no others"),
        (dict(out_scale=1.0), ValueError, "out_scale goes with float8_e4m3fn results and no others"),
        (dict(out_dtype=FP8, out_scale=-1.0), ValueError, "out_scale must be positive and finite, got -1.0"),
        (dict(out_dtype=FP8, out_scale=torch.ones(2)), ValueError, "a float32 Tensor of one element"),
        (dict(out=TO[0]), TypeError, "out must be two Tensors (out, lse), got Tensor"),
        (dict(out=(TO[0][:2], TO[1])), ValueError, "out[0] must have shape [4, 2, 8], got [2, 2, 8]"),
        (dict(out=(TO[0], TO[1][:1])), ValueError, "out[1] must have shape [4, 2], got [1, 2]"),
        (dict(out=(TO[0], TO[1].half())), TypeError, "out[1] must be torch.float32, got torch.float16"),
        (dict(out=(TO[0].int(), TO[1])), TypeError, "out_dtype must be one of"),
        (dict(out=TO, out_dtype=torch.float16), TypeError, "out[0] must be out_dtype torch.float16, got torch.float32"),
        (dict(out=(TO[0].mT.contiguous().mT, TO[1])), ValueError, "out[0] must have a dense last dimension"),
        (dict(out=TO, outs=O.clone().requires_grad_()), ValueError, "with out there are no gradients"),
        (dict(out=(TO[0].to("meta"), TO[1])), ValueError, "out[0] must be on the device cpu, got meta"),
        (dict(outs=O.clone().requires_grad_(), out_dtype=FP8, out_scale=1.0), ValueError, "have no gradients"),
        (dict(backend="numpy"), ValueError, "backend must be one of 'auto', 'triton'"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error) as caught:
        merge_states(**(dict(outs=O, lses=L) | change))
    assert str(caught.value).startswith("merge_states: ") and message in str(caught.value)


def test_values_are_checked_again_when_they_change():
    indptr, factors = torch.tensor([0, 3]), torch.ones(3)
    merge_states(O, L, indptr=indptr, lse_scale=factors)
    indptr[1] = 2
    with pytest.raises(ValueError, match="indptr must end at 3"):
        merge_states(O, L, indptr=indptr)
    factors[0] = 0
    with pytest.raises(ValueError, match=r"lse_scale\[0\] must be positive"):
        merge_states(O, L, lse_scale=factors)


def test_no_backend_in_silence():
    with pytest.raises(attnlab.BackendError, match="float64"):
        merge_states(O.double(), L.double(), backend="triton")
    assert attnlab.explain(merge_states, O, L).chosen in HERE
