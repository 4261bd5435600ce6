"""Every backend of `selective_attention` against a mask over all scores in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnlab
from attnlab.fusionrag import future_share
from attnlab.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling, apply_rope
from attnlab.testing import assert_accurate, gaussian, plain_attention
from tests.fusionrag_problems import CASES, LAYOUTS, Problem

HAS_CUDA = torch.cuda.is_available()
BACKENDS = ["reference", "portable", "cpu", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter is slow and computes bfloat16 wrongly: there it runs a few cases in float32.
INTERPRETED = ("repeated, gqa 8", "padding between", "no keys", "ragged")


@pytest.fixture
def device(backend, device):
    """The C kernels stay on the CPU where there is a GPU."""
    return torch.device("cpu") if backend == "cpu" else device


def interpreted(backend):
    return backend == "triton" and not HAS_CUDA


def every(names, few, dtypes=DTYPES):
    """`(name, backend, dtype, layout)`."""
    for backend in BACKENDS:
        for dtype in dtypes[:1] if interpreted(backend) else dtypes:
            for name in few if interpreted(backend) else names:
                for layout in LAYOUTS:
                    yield pytest.param(name, backend, dtype, layout, id=f"{name}-{backend}-{str(dtype)[6:]}-{layout}")


@pytest.mark.parametrize("name, backend, dtype, layout", every(CASES, INTERPRETED))
def test_accuracy(name, backend, dtype, layout, device):
    index = torch.int64 if layout in ("packed", "slots") else torch.int32
    Problem(CASES[name]).check(layout, dtype, device, index, backend=backend)


ROPES = {
    "default": RopeConfig(10000.0, 64),
    "partial": RopeConfig(10000.0, 64, rotary_dim=24),
    "interleaved": RopeConfig(10000.0, 64, interleaved=True),
    "interleaved, partial": RopeConfig(10000.0, 64, rotary_dim=16, interleaved=True),
    "linear": RopeConfig(10000.0, 64, scaling=LinearScaling(4.0)),
    "yarn": RopeConfig(10000.0, 64, scaling=YarnScaling(4.0, 64)),
    "llama3": RopeConfig(500000.0, 64, scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
}


@pytest.mark.parametrize("name, backend, dtype, layout", every(ROPES, ["partial"], DTYPES[:2]))
def test_keys_are_turned_while_they_are_loaded(name, backend, dtype, layout, device):
    case = ([70, 1, 33], ["sorted", "all", "unsorted"], 4, 2, 64)
    Problem(case, rope=ROPES[name]).check(layout, dtype, device, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [ROPES["default"], ROPES["interleaved, partial"]], ids=["default", "interleaved"])
def test_turned_keys_are_those_of_their_new_positions(config, backend, device):
    """A chunk computed at one place serves at another: the state is that of a model that saw it there."""
    q, k, v = gaussian(1, 9, 80, 4, 2, 64)
    old, new = torch.arange(80), torch.arange(80) + 1000
    at = torch.randint(80, (1, 9), generator=torch.Generator().manual_seed(0))
    stored = apply_rope(k.double(), old, config)
    there = apply_rope(k.double(), new, config)
    want = plain_attention(q.double(), there, v.double(), torch.arange(80) <= at[0, :, None])[0]
    given = (x.to(device) for x in (q, stored.float(), v, at))
    found = attnlab.selective_attention(*given, shift=(new - old)[None].to(device), rope=config, backend=backend)
    torch.testing.assert_close(found.cpu().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_longer_or_shorter_than_the_row(backend, device):
    """Only a row's own keys need one."""
    rope, (q, k, v) = ROPES["default"], gaussian(2, 5, 40, 2, 1, 64)
    at, lengths = torch.tensor([[0, 9, 3, -1, 5], [19, 4, 0, 18, 2]]), torch.tensor([10, 20], dtype=torch.int32)
    shift = torch.randint(-50, 50, (2, 60), generator=torch.Generator().manual_seed(1))
    given = [x.to(device) for x in (q, k, v, at)]
    options = dict(lengths=lengths.to(device), rope=rope, backend=backend)
    found = [attnlab.selective_attention(*given, shift=shift[:, :wide].to(device), **options) for wide in (20, 40, 60)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_positions_are_dense_causal_attention(backend, device):
    q, k, v = (x.to(device) for x in gaussian(2, 100, 100, 4, 2, 32))
    at = torch.arange(100, device=device).expand(2, -1)
    truth = attnlab.full_attention(*(x.double() for x in (q, k, v)), return_lse=True, backend="reference")
    plain = attnlab.full_attention(q, k, v, return_lse=True, backend="portable")
    found = attnlab.selective_attention(q, k, v, at, return_lse=True, backend=backend)
    for a, t, p in zip(found, truth, plain, strict=True):
        assert_accurate(a, t, p, roundings=2)


def shortcut(at, length):
    """The rows of one request under `mask="bottom_right"`."""
    real = [p for p in at if p >= 0]
    places = iter(range(length - len(real), length))
    return [next(places) if p >= 0 else -1 for p in at]


@pytest.mark.parametrize("layout", ["contiguous", "packed", "slots"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bottom_right_is_its_own_mask(backend, layout, device):
    p = Problem(([90, 1, 40, 17, 65, 30], ["sorted", "one", "none", "all", "holes", "repeated"], 4, 2, 32))
    wrong = [shortcut(at, n) for at, n in zip(p.rows, p.lengths, strict=True)]
    found = p.results(layout, torch.float32, device, mask="bottom_right", backend=backend)
    exact = p.results(layout, torch.float32, device, backend=backend)
    truth, plain = p.expected(rows=wrong), p.expected(torch.float32, rows=wrong)
    for a, t, r in zip(found, truth, plain, strict=True):
        assert_accurate(a[0], t[0], r[0], roundings=2)
        assert_accurate(a[1], t[1], r[1], roundings=2)
    for request in (0, 4, 5):
        assert (found[request][0] - exact[request][0]).abs().max() > 0.1
    assert torch.equal(found[3][0], exact[3][0])  # all rows in order: nothing to get wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_bottom_right_with_more_rows_than_keys(backend, device):
    q, k, v = (x.to(device) for x in gaussian(1, 6, 4, 2, 1, 16))
    at = torch.tensor([[3, 3, 2, 1, 0, 0]], device=device)
    _, lse = attnlab.selective_attention(q, k, v, at, mask="bottom_right", return_lse=True, backend=backend)
    assert (lse[0, :2] == -torch.inf).all() and lse[0, 2:].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "slots"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_reruns_are_bitwise_equal_in_any_order_of_the_rows(backend, layout, device):
    """A row's result does not depend on where in the call it stands."""
    p = Problem(([90, 40], ["unsorted", "unsorted"], 4, 2, 32))
    first, second = (p.results(layout, torch.float32, device, backend=backend) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for request, at in enumerate(p.rows):
        order = torch.tensor(at).argsort()
        p.rows[request], p.q[request] = torch.tensor(at)[order].tolist(), p.q[request][order]
        first[request] = [x[order] for x in first[request]]
    for a, b in zip(first, p.results(layout, torch.float32, device, backend=backend), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, device):
    """`[B, H, T, D]` transposed and slices of a fused projection, as transformers has them; elements with gaps."""
    x = gaussian(2, 40, 40, 2, 2, 16)
    at = torch.randperm(40, generator=torch.Generator().manual_seed(0)).expand(2, -1).to(device)
    want = attnlab.selective_attention(*(t.to(device) for t in x), at, backend=backend)
    fused = torch.cat(x, -1).to(device).split(16, -1)
    transposed = [t.to(device).transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    wide = at.repeat_interleave(2, 1)[:, ::2]
    gaps = [torch.stack([t, t * torch.nan], -1)[..., 0].to(device) for t in x]
    for inputs in (fused, transposed, gaps):
        assert torch.equal(attnlab.selective_attention(*inputs, wide, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_huge_scores(backend, device):
    q, k, v = gaussian(1, 30, 60, 2, 1, 16, scale=30.0)
    at = torch.arange(0, 60, 2)[None]
    for scale in (0.0, -0.3, 2.0):
        truth, plain = (
            plain_attention(q.to(t), k.to(t), v.to(t), torch.arange(60) <= at[0, :, None], scale)[0]
            for t in (torch.float64, torch.float32)
        )
        given = (x.to(device) for x in (q, k, v, at))
        found = attnlab.selective_attention(*given, scale=scale, backend=backend).cpu()
        assert_accurate(found, truth, plain, roundings=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_where_it_should(backend, device):
    q, k, v = (x.to(device) for x in gaussian(1, 64, 64, 2, 1, 16))
    at = torch.arange(64, device=device)[None]
    q[0, 40] = torch.nan
    bad = attnlab.selective_attention(q, k, v, at, backend=backend)[0].isnan().flatten(1).any(1).cpu()
    assert bad.nonzero().tolist() == [[40]]
    q, k, v = (x.to(device) for x in gaussian(1, 64, 64, 2, 1, 16))
    k[0, 50] = torch.nan
    bad = attnlab.selective_attention(q, k, v, at, backend=backend)[0].isnan().flatten(1).any(1).cpu()
    assert bad[50:].all()


@given(st.data())
@pytest.mark.parametrize("backend", [b for b in BACKENDS if not interpreted(b)])
def test_any_rows_of_any_requests(backend, device, data):
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    at = [data.draw(st.lists(st.integers(-1, n - 1), max_size=30)) for n in lengths]
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    layout = data.draw(st.sampled_from(LAYOUTS))
    rope = data.draw(st.sampled_from([None, RopeConfig(100.0, 8)]))
    problem = Problem((lengths, at, kv_heads * group, kv_heads, 8), rope=rope)
    problem.check(layout, torch.float32, device, backend=backend)


def test_future_share_counts_pairs():
    g = torch.Generator().manual_seed(0)
    for length, n in ((20, 20), (20, 1), (33, 12), (5, 9), (4, 0)):
        at = torch.randint(-1, length, (3, n), generator=g)
        pairs = [
            (p, j) for row in at.tolist() for p, s in zip(row, shortcut(row, length), strict=True) for j in range(s + 1)
        ]
        want = sum(j > p for p, j in pairs) / len(pairs) if pairs else 0.0
        assert future_share(at, length) == want
        assert future_share(at[0].int(), length) == future_share(at[:1], length)
    assert future_share(torch.arange(30), 30) == 0.0


def test_future_share_of_the_usual_rate():
    """Some 45 % of what the shortcut attends at 32K and 15 % lies in the future."""
    at = torch.randperm(32768, generator=torch.Generator().manual_seed(0))[:4915].sort().values
    assert 0.44 < future_share(at, 32768) < 0.48
