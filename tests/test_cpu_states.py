"""The C merge and append: every layout against float64, whatever the threads, on narrower vectors as well."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab.kernels.cpu import states
from attnlab.states import merge_states
from tests.state_problems import FP8, States, Tokens, guarded

F, H, B = torch.float32, torch.float16, torch.bfloat16

# n, m, h, d, what else.
MERGES = {
    "two": ((2, 5, 16, 128), {}),
    "one": ((1, 3, 2, 128), {}),
    "257": ((257, 2, 3, 64), dict(factors=True)),
    "more heads than lanes": ((5, 2, 37, 20), dict(base2=True, factors=True)),
    "one head of many rows": ((3, 70, 1, 36), dict(base2=True)),
    "many vectors": ((4, 2, 3, 311), {}),
    "gaps": ((3, 4, 5, 20), dict(layout="aligned", base2=True)),
    "odd": ((6, 3, 18, 33), dict(layout="odd", factors=True)),
    "one element": ((3, 70, 1, 1), {}),
    "runs": ((0, 0, 3, 12), dict(counts=[2, 0, 7, 1, 300, 0], factors=True)),
    "runs, odd": ((0, 0, 20, 7), dict(counts=[0, 3, 9], layout="odd", base2=True)),
    "no entries": ((0, 0, 2, 8), dict(counts=[0, 0])),
}
APPENDS = {
    "alone": ((3, 4, 4, 128), {}),
    "grouped, odd": ((5, 6, 2, 33), dict(base2=True, layout="odd")),
    "one element": ((3, 4, 1, 1), {}),
    "many": ((90, 8, 1, 80), dict(layout="aligned")),
}


@pytest.mark.parametrize("dtype, to", [(F, F), (H, H), (B, B), (F, B), (H, F), (B, FP8), (F, FP8)], ids=str)
@pytest.mark.parametrize("case", MERGES)
def test_merge(case, dtype, to):
    shape, options = MERGES[case]
    problem = States(*shape, dtype=dtype, to=to, **options)
    problem.check(states.merge)
    if options.get("layout"):
        assert guarded(problem.out) and guarded(problem.lse)


@pytest.mark.parametrize("dtype, state, to", [(F, F, F), (H, H, H), (B, F, F), (B, B, F), (H, F, H)], ids=str)
@pytest.mark.parametrize("case", APPENDS)
def test_append(case, dtype, state, to):
    shape, options = APPENDS[case]
    problem = Tokens(*shape, dtype=dtype, state=state, to=to, **options)
    problem.check(states.append)
    if options.get("layout"):
        assert guarded(problem.out) and guarded(problem.lse)
    want = [x.clone() for x in (problem.out, problem.lse)]
    if state == to:
        problem.out, problem.lse = problem.before, problem.lse_before
    assert all(map(torch.equal, problem.run(states.append), want))


@given(
    n=st.integers(1, 40), m=st.integers(1, 9), h=st.integers(1, 40), d=st.integers(1, 150), seed=st.integers(0, 99),
    layout=st.sampled_from(["dense", "aligned", "odd"]), options=st.sampled_from([{}, dict(factors=True, base2=True)]),
)  # fmt: skip
@settings(max_examples=30)
def test_any_merge(n, m, h, d, seed, layout, options):
    States(n, m, h, d, layout=layout, seed=seed, **options).check(states.merge)


@pytest.mark.parametrize("shard", [0, 4])
@pytest.mark.parametrize("d", [32, 311])
def test_a_state_is_its_own_result(shard, d):
    problem = States(9, 3, 20, d, base2=True)
    want = [x.clone() for x in problem.run(states.merge)]
    problem.out, problem.lse = problem.outs[shard], problem.lses[shard]
    assert all(map(torch.equal, problem.run(states.merge), want))


@pytest.mark.parametrize("counts", [None, [5, 0, 900, 3] * 20])
def test_threads_change_no_bit(counts):
    """Sizes that are worth several threads."""
    merge, append = States(6, 300, 16, 128, counts=counts), Tokens(700, 16, 2, 64)
    problems, before = ((merge, states.merge), (append, states.append)), torch.get_num_threads()
    assert min(merge.outs.nbytes, 3 * append.q.nbytes) > 4 << 20
    want = [[x.clone() for x in problem.run(fn)] for problem, fn in problems]
    try:
        for threads in (1, 3, 64):
            torch.set_num_threads(threads)
            for (problem, fn), expected in zip(problems, want, strict=True):
                for x in (problem.out, problem.lse):
                    x.fill_(math.nan)
                assert all(map(torch.equal, problem.run(fn), expected))
    finally:
        torch.set_num_threads(before)


def test_every_rounding_is_torch_s():
    """Half, bfloat16 and 8-bit codes of floats near every tie, of subnormal numbers, infinities and NaN."""
    codes = torch.arange(1 << 16, dtype=torch.int32) * 65536
    near = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0xEFFF, 0xF000, 0xFFFF])
    x = (codes[:, None] + near).int().flatten().view(torch.float32)
    x = torch.cat([x, torch.arange(-(1 << 12), 1 << 12) * 2.0**-26, torch.arange(-999, 999) * 2.0**-12])
    x = torch.where(x == 0, 0.0, x)  # a sum that starts at 0 is never -0
    x = x[: len(x) // 32 * 32].view(1, -1, 1, 32)
    for dtype, wanted, scale in ((H, x, None), (B, x, None), (FP8, x.clamp(-448, 448), torch.ones(1))):
        out, lse = torch.empty(x.shape[1:], dtype=dtype), torch.empty(x.shape[1:3])
        states.merge(x, torch.zeros(x.shape[:3]), None, None, False, out, lse, scale)
        wanted = wanted[0].to(dtype)
        bits = torch.uint8 if dtype == FP8 else torch.int16
        same = (out.view(bits) == wanted.view(bits)) | (out.float().isnan() & wanted.float().isnan())
        assert same.all() and lse.eq(0).all()


def test_a_nan_lse_is_seen():
    problem = States(3, 2, 2, 32)
    problem.lses[1, 1, 0] = math.nan
    out, lse = problem.run(states.merge)
    assert out[1, 0].isnan().all() and lse.isnan().sum() == 1 and out.isnan().sum() == 32


def test_narrower_vectors(narrower):
    for case in ("more heads than lanes", "many vectors", "odd", "runs"):
        for dtype, to in ((F, F), (H, H), (B, FP8)):
            test_merge(case, dtype, to)
    test_append("grouped, odd", H, F, H)
    test_every_rounding_is_torch_s()


def test_public_function():
    problem = States(5, 6, 3, 40, factors=True)
    outs, lses = problem.outs.view(5, 2, 3, 3, 40), problem.lses.view(5, 2, 3, 3)
    call = dict(lse_base="2", lse_scale=problem.factors)
    want = merge_states(outs.nan_to_num().double(), lses.double(), backend="reference", **call)
    got = merge_states(outs, lses, backend="cpu", **call)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert attnlab.explain(merge_states, outs, lses).chosen == "cpu"
    assert attnlab.explain(merge_states, outs.double(), lses.double()).chosen == "portable"
