"""The CUDA C++ wave buffer, run on the CPU thread by thread, against the plain model of the policy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.kernels import configs
from attnlab.kernels.cuda import module, retroinfer
from tests.cuda_emulation.emulate import COMPILER
from tests.wave_traces import EVERY, Trace, run

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the emulation with")

POLICIES = ("clock", "lru")


@pytest.fixture
def serve(emulated, monkeypatch):
    """Two warps a block, so that a cache of 100 pages takes two rounds; threads run in either order by turns."""
    monkeypatch.setitem(configs.TABLES, "cuda.buffer", {(0, 256, 4): {"THREADS": 64, "BLOCKS": 6}})

    def either_way(*arguments):
        emulated.falling = not emulated.falling
        retroinfer.serve(*arguments)

    return either_way


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "capacity, page, most, sizes",
    [(1, 9, 1, 9), (12, 2, 4, 9), (100, 1, 20, 9), (60, 1, 80, 3), (64, 1, 9, 9), (400, 3, 9, 9)],
    ids=["one place", "few", "more places than threads", "more clusters than threads", "as many", "everything fits"],
)
def test_traces(serve, policy, capacity, page, most, sizes):
    trace = Trace(serve, policy, capacity, page, tokens=320, refuses=False)
    hits, misses, evictions = run(trace, 30, most, sizes)
    assert misses > 20 and (hits > 20) == (capacity > 1) and (evictions > 20) == (capacity < 400)


@given(
    policy=st.sampled_from(POLICIES), capacity=st.integers(1, 9), page=st.integers(1, 4), most=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=20)
def test_any_trace(serve, policy, capacity, page, most, seed):
    """Heads that ask for too much among others that do not."""
    run(Trace(serve, policy, capacity, page, refuses=False), 12, most, seed=seed)


@pytest.mark.parametrize(
    "dim, dtype, unit", [(8, "float16", 16), (2, "float32", 8), (6, "float16", 4), (3, "float16", 2)]
)
def test_copies_of_any_width(serve, monkeypatch, dim, dtype, unit):
    units, launch = [], module.launch

    def watch(source, name, grid, block, arguments, *others):
        units.extend(arguments[-1:] * (name == "buffer_fetch"))
        launch(source, name, grid, block, arguments, *others)

    monkeypatch.setattr(module, "launch", watch)
    trace = Trace(serve, "clock", 9, 4, dim=dim, dtype=getattr(torch, dtype), refuses=False)
    run(trace, 12, 3)
    assert set(units) == {unit}


def test_a_long_page_and_the_width_of_a_warp(serve):
    """More 16-byte units a page than one batch of loads takes."""
    trace = Trace(serve, "lru", 5, 11, dim=36, dtype=torch.float64, refuses=False)
    run(trace, 10, 2, sizes=30)


def test_production_threads(serve, monkeypatch):
    monkeypatch.setitem(configs.TABLES, "cuda.buffer", {(0, 256, 4): {"THREADS": 256, "BLOCKS": 1024}})
    trace = Trace(serve, "clock", 300, 1, tokens=400, refuses=False)
    run(trace, 6, 80)


def test_a_refused_head_reads_on(serve):
    """What the others ask for is there; the refused head's cache is what it was."""
    trace = Trace(serve, "clock", 3, 2, refuses=False)
    for at in EVERY:
        trace.grow(at, [4, 5, 1])
    trace.step({at: [0] for at in EVERY})
    trace.step({at: [2] for at in EVERY} | {(1, 0): [0, 1]})
    trace.step({at: [2] for at in EVERY} | {(1, 0): [1, 2]})
    assert trace.cache.overflow.tolist() == [[0, 0], [5, 0]]
    assert trace.cache.steps.tolist() == [[3, 3], [1, 3]]
    assert (trace.cache.slot_map[1, 0] >= 0).sum() == 2
