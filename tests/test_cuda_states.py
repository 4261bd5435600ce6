"""The CUDA C++ merge and append, run on the CPU thread by thread, against float64."""

import math

import pytest
import torch

from attnlab import dispatch
from attnlab.append import append_token
from attnlab.dispatch import Call
from attnlab.kernels import configs
from attnlab.kernels.cuda import module, states
from attnlab.states import BACKENDS, FP8_BACKENDS, merge_states
from tests.cuda_emulation.emulate import COMPILER
from tests.state_problems import FP8, States, Tokens, guarded

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the emulation with")

F, H, B = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def launches(emulated, monkeypatch):
    """Blocks of two warps that shared rows do not fill; threads run in either order by turns. What was launched."""
    monkeypatch.setitem(configs.TABLES, "cuda.states", {(0, 256, 4): {"THREADS": 64, "BYTES": 64, "FILL": 65536}})
    seen, real = [], module.launch

    def launch(source, name, grid, block, arguments, device, defines):
        emulated.falling = not emulated.falling
        seen.append((dict(defines), arguments[-3:]))  # base2 or lanes, ... as the kernels have them
        real(source, name, grid, block, arguments, device, defines)

    monkeypatch.setattr(module, "launch", launch)
    return seen


# n, m, h, d, what else; and the unit that has to come of it.
MERGES = {
    "two": ((2, 5, 3, 128), {}, 4),
    "one": ((1, 3, 2, 128), {}, 4),
    "many, shared rows": ((37, 2, 3, 32), dict(factors=True), 4),
    "a row of more than a warp": ((5, 2, 2, 200), dict(base2=True, factors=True), 4),
    "a long row, shared": ((17, 1, 1, 36), dict(base2=True), 4),
    "gaps": ((3, 4, 5, 20), dict(layout="aligned", base2=True), 4),
    "odd addresses": ((6, 3, 2, 24), dict(layout="odd"), 1),
    "odd size": ((6, 3, 2, 33), dict(factors=True), 1),
    "one element": ((3, 70, 1, 1), {}, 1),
    "runs": ((0, 0, 3, 12), dict(counts=[2, 0, 7, 1, 30, 0], factors=True), 4),
    "runs, odd": ((0, 0, 2, 7), dict(counts=[0, 3, 9], layout="odd", base2=True), 1),
    "no entries": ((0, 0, 2, 8), dict(counts=[0, 0]), 4),
    "half": ((3, 4, 3, 80), dict(dtype=H), 8),
    "bfloat16": ((9, 2, 3, 128), dict(dtype=B, layout="aligned"), 8),
    "bfloat16, odd": ((5, 2, 2, 9), dict(dtype=B, layout="odd"), 1),
    "half in pairs": ((5, 2, 3, 38), dict(dtype=H), 2),
    "half to float": ((4, 2, 2, 96), dict(dtype=H, to=F), 8),
    "float to bfloat16": ((6, 2, 2, 64), dict(to=B), 8),
    "bfloat16 to 8 bits": ((3, 4, 5, 80), dict(dtype=B, to=FP8), 16),
    "float to 8 bits": ((20, 2, 2, 32), dict(to=FP8, factors=True), 16),
    "float to 8 bits, odd": ((3, 2, 2, 5), dict(to=FP8, layout="odd"), 1),
}


@pytest.mark.parametrize("case", MERGES)
def test_merge(launches, case):
    shape, options, unit = MERGES[case]
    problem = States(*shape, **options)
    problem.check(states.merge)
    assert [x["UNIT"] for x, _ in launches] == [unit]
    if options.get("layout"):
        assert guarded(problem.out) and guarded(problem.lse)
    before = problem.out.clone(), problem.lse.clone()
    after = problem.run(states.merge)  # threads in the other order
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(before, after, strict=True))


def test_rows_are_shared_where_they_are_few(launches):
    splits = {}
    for n, m in ((37, 1), (4, 1), (5, 1), (37, 600)):
        States(n, m, 2, 32).check(states.merge)
        splits[n, m] = launches[-1][1][1]
    assert splits == {(37, 1): 8, (4, 1): 1, (5, 1): 2, (37, 600): 8}
    configs.TABLES["cuda.states"][0, 256, 4]["FILL"] = 1
    States(37, 1, 2, 32).check(states.merge)
    assert launches[-1][1][1] == 1


@pytest.mark.parametrize("shard", [0, 4])
@pytest.mark.parametrize("d", [32, 200, 33])
@pytest.mark.parametrize("fill", [65536, 1], ids=["shared", "alone"])
def test_a_state_is_its_own_result(launches, shard, d, fill):
    configs.TABLES["cuda.states"][0, 256, 4]["FILL"] = fill
    for _ in range(2):  # threads in either order
        problem = States(9, 3, 4, d, base2=True)
        truth = problem.expected()
        problem.out, problem.lse = problem.outs[shard], problem.lses[shard]
        out, lse = problem.run(states.merge)
        torch.testing.assert_close(out.double(), truth[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-6)


def test_a_nan_lse_is_seen_and_the_largest_8_bit_number_is_the_end(launches):
    outs = torch.tensor([1e30, math.inf, -1e4, math.nan, -1.0, 0.0, 2.0**-10, 3 * 2.0**-10] * 2).view(1, 1, 1, 16)
    out, lse, one = torch.empty(1, 1, 16, dtype=FP8), torch.empty(1, 1), torch.ones(1)
    states.merge(outs, torch.zeros(1, 1, 1), None, None, False, out, lse, one)
    assert torch.equal(out.view(torch.uint8), outs[0].clamp(-448, 448).to(FP8).view(torch.uint8))
    problem = States(3, 2, 2, 32)
    problem.lses[1, 1, 0] = math.nan
    out, lse = problem.run(states.merge)
    assert out[1, 0].isnan().all() and lse.isnan().sum() == 1 and out.isnan().sum() == 32


# m, hq, hkv, d, what else; and the unit that has to come of it.
APPENDS = {
    "alone": ((3, 4, 4, 128), {}, 4),
    "grouped, odd size": ((5, 6, 2, 33), dict(base2=True), 1),
    "more than a warp": ((2, 4, 1, 200), {}, 4),
    "odd addresses": ((3, 2, 1, 24), dict(layout="odd"), 1),
    "bfloat16": ((3, 8, 2, 128), dict(dtype=B, layout="aligned", base2=True), 8),
    "half, state in float": ((3, 4, 2, 96), dict(dtype=H, state=F, to=F), 8),
    "half, result in float": ((3, 3, 1, 80), dict(dtype=H, to=F), 8),
}


@pytest.mark.parametrize("case", APPENDS)
def test_append(launches, case):
    shape, options, unit = APPENDS[case]
    problem = Tokens(*shape, **options)
    problem.check(states.append)
    assert [x["UNIT"] for x, _ in launches] == [unit]
    if options.get("layout"):
        assert guarded(problem.out) and guarded(problem.lse)
    want = [x.clone() for x in (problem.out, problem.lse)]
    if problem.out.dtype == problem.before.dtype:
        problem.out, problem.lse = problem.before, problem.lse_before
    assert all(map(torch.equal, problem.run(states.append), want))


def test_nothing_to_do(launches):
    States(3, 0, 2, 8).run(states.merge)
    Tokens.run(_no_tokens(), states.append)
    assert not launches


def _no_tokens():
    problem = Tokens(1, 2, 1, 8)
    for name in ("before", "lse_before", "q", "k", "v", "out", "lse"):
        setattr(problem, name, getattr(problem, name)[:0])
    return problem


def test_8_bit_results_need_a_gpu_that_has_them(emulated, monkeypatch):
    monkeypatch.setattr(module, "arch", lambda device: 80)
    with pytest.raises(ValueError, match=r"float8_e4m3fn results need compute capability 8.9 or later, got 8.0"):
        States(2, 1, 1, 16, to=FP8).run(states.merge)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    call = Call("merge_states", torch.device("cuda"), F, 16)
    assert any("8.9 or later" in reason for reason in FP8_BACKENDS["cuda"](call))
    assert not any("8.9 or later" in reason for reason in BACKENDS["cuda"](call) + FP8_BACKENDS["triton"](call))


def test_needs_no_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda module: module != "triton")
    call = Call("merge_states", torch.device("cuda"), F, 16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert BACKENDS["triton"](call) and dispatch.cuda_reasons(call) and not BACKENDS["cuda"](call)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, to", [(F, F), (H, H), (B, B), (B, F), (F, B), (B, FP8), (F, FP8)], ids=str)
@pytest.mark.parametrize("d", [128, 200, 33])
def test_on_a_gpu(dtype, to, d):
    """The compiled kernels, in and out of a CUDA graph, against float64; the same bits on every run."""
    if to == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")
    for problem, run in (
        (States(2, 512, 16, d, dtype=dtype, to=to, factors=True), states.merge),
        (States(40, 2, 3, d, dtype=dtype, to=to, base2=True), states.merge),
        (States(0, 0, 5, d, dtype=dtype, to=to, counts=[3, 0, 70, 1]), states.merge),
        (Tokens(30, 8, 2, d, dtype=dtype, to=dtype if to == FP8 else to), states.append),
    ):
        expected = problem.expected(), problem.expected(torch.float32)
        move(problem, "cuda")
        want = [x.clone() for x in problem.run(run)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            problem.run(run)
        problem.out.zero_()
        graph.replay()
        assert all(torch.equal(a.float(), b.float()) for a, b in zip((problem.out, problem.lse), want, strict=True))
        move(problem, "cpu")
        problem.expected = lambda dtype=torch.float64, x=expected: x[dtype == torch.float32]
        problem.check(lambda *_: None)


@pytest.mark.gpu
def test_public_functions_on_a_gpu():
    outs, lses = torch.randn(3, 2, 7, 4, 80, device="cuda", dtype=B), torch.randn(3, 2, 7, 4, device="cuda")
    got = merge_states(outs, lses, out_dtype=F, backend="cuda")
    want = merge_states(outs, lses, out_dtype=F, backend="reference")
    k = torch.randn(2, 7, 2, 80, device="cuda", dtype=B)
    got += append_token(got, outs[0], k, k, backend="cuda")
    want += append_token(want, outs[0], k, k, backend="reference")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def move(problem, device):
    for name, x in vars(problem).items():
        if isinstance(x, torch.Tensor):
            setattr(problem, name, x.to(device))
