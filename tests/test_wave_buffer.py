"""The wave buffer's steps against the plain model of its policy: contents, counters and hand, on every backend."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from attnlab import wave_reference
from attnlab.kernels.retroinfer import buffer_portable
from attnlab.kernels.retroinfer.buffer import clear
from attnlab.reference.wave_buffer import cluster_pages
from tests.wave_traces import EVERY, Trace, run

SERVE = {"portable": buffer_portable.serve, "reference": wave_reference.serve}
POLICIES = ("clock", "lru")


class Machine(RuleBasedStateMachine):
    """Any order of steps, growth, refusals and resets."""

    serve = staticmethod(buffer_portable.serve)

    @initialize(policy=st.sampled_from(POLICIES), capacity=st.integers(1, 7), page=st.integers(1, 4))
    def start(self, policy, capacity, page):
        self.trace = Trace(self.serve, policy, capacity, page)

    @rule(at=st.sampled_from(EVERY), sizes=st.lists(st.integers(0, 9), max_size=6))
    def grow(self, at, sizes):
        self.trace.grow(at, sizes)

    def choose(self, data, fit):
        choice = {}
        for at, sizes in self.trace.sizes.items():
            wanted = data.draw(st.permutations(range(len(sizes)))) if sizes else []
            room = self.trace.cache.capacity if fit else 99
            choice[at] = []
            for c in wanted[: data.draw(st.integers(0, 4))]:
                room -= len(cluster_pages(c, 0, sizes[c], self.trace.page))
                if room >= 0:
                    choice[at].append(c)
        return choice

    @rule(data=st.data(), width=st.integers(1, 9))
    def step(self, data, width):
        self.trace.step(self.choose(data, True), width)

    @rule(data=st.data())
    def ask_for_anything(self, data):
        self.trace.step(self.choose(data, False))

    @precondition(lambda self: any(model.steps for model in self.trace.models.values()))
    @rule()
    def reset(self):
        clear(self.trace.cache)
        self.trace.reset_models()
        self.trace.check()


class ReferenceMachine(Machine):
    serve = staticmethod(wave_reference.serve)


TestPortable = Machine.TestCase
TestPortable.settings = settings(max_examples=40, stateful_step_count=20)
TestReference = ReferenceMachine.TestCase
TestReference.settings = settings(max_examples=10, stateful_step_count=20)


@pytest.mark.parametrize("backend", SERVE)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity, page, most", [(1, 9, 1), (12, 2, 3), (33, 1, 3), (90, 3, 9)])
def test_long_traces(policy, capacity, page, most, backend):
    """One place; seldom, often and never a victim."""
    found = run(Trace(SERVE[backend], policy, capacity, page), 40, most, clusters=4)
    assert min(found[:2]) > 5 and (found[2] > 5) == (capacity < 90)


def test_one_head_too_many_pages_refuses_the_step():
    choice = {at: [0] for at in EVERY} | {(1, 0): [0, 1]}
    trace = Trace(buffer_portable.serve, "clock", 3, 2)
    for at in EVERY:
        trace.grow(at, [4, 5])
    trace.step(choice)
    assert (trace.cache.steps == 0).all()
    with pytest.raises(
        ValueError, match="row 1, KV head 0 asks for 5 pages of 2 vectors in one step, its cache holds 3"
    ):
        buffer_portable.serve(torch.tensor([[[0, -1], [0, -1]], [[0, 1], [0, -1]]]).int(), trace.store, trace.cache)
    trace.step({at: [1] for at in EVERY})
    assert (trace.cache.steps == 1).all()


class Replayed:
    """A step of the CUDA kernels as a graph, captured at the first call on caches that it leaves as they were."""

    graph = None

    def __call__(self, chosen, store, cache):
        from attnlab.kernels.cuda.retroinfer import serve

        if self.graph is None:
            before = [x.clone() for x in cache[:-1]]
            self.chosen = chosen.clone()
            serve(self.chosen, store, cache)
            for x, y in zip(cache[:-1], before, strict=True):
                x.copy_(y)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                serve(self.chosen, store, cache)
        self.chosen.copy_(chosen)
        self.graph.replay()


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity, page, most", [(12, 2, 3), (400, 1, 60), (90, 3, 9)])
def test_cuda_graphs(policy, capacity, page, most):
    run(Trace(Replayed(), policy, capacity, page, tokens=900, dim=24, refuses=False, device="cuda"), 60, most)
