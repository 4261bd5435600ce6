"""How the portable selective attention is cut: every pair once, little masked, nothing the size of rows x keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.kernels.fusionrag import portable
from attnlab.kernels.fusionrag.spec import Keys
from attnlab.testing import gaussian
from tests.fusionrag_problems import CASES, LAYOUTS, Problem


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(portable, "CHUNK_ROWS", 16)
    monkeypatch.setattr(portable, "SPLIT_WORK", 500)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_small_tiles(name, layout, small):
    Problem(CASES[name]).check(layout, torch.float32, backend="portable")


@pytest.mark.parametrize("name", ["ragged", "unsorted, gqa 3"])
def test_explicit_path(name, monkeypatch):
    """What runs where PyTorch's CPU kernel does not."""
    monkeypatch.setattr("attnlab.kernels.states.portable.uses_cpu_kernel", lambda x: False)
    Problem(CASES[name]).check("slots", torch.float32, backend="portable")


@given(at=st.lists(st.integers(0, 60), min_size=1, max_size=40).map(sorted), group=st.integers(1, 3))
def test_every_pair_once(at, group, small):
    seen = torch.zeros(len(at), 61, dtype=torch.int)
    for block in portable.blocks(at, group, 4):
        for i in range(block.a, block.b):
            stop = min(block.stop, at[i] + 1) if block.masked else block.stop
            assert stop > block.start
            seen[i, block.start : stop] += 1
    assert torch.equal(seen, (torch.arange(61) <= torch.tensor(at)[:, None]).int())


def test_little_is_masked_or_wasted():
    at = torch.randperm(32768, generator=torch.Generator().manual_seed(0))[:4915].sort().values.tolist()
    cut = list(portable.blocks(at, 1, 8 * 64))
    pairs = sum(at) + len(at)
    done = sum((b.b - b.a) * (b.stop - b.start) for b in cut)
    assert done < 1.02 * pairs and len(cut) < 250
    # A row's keys in one piece: a lone row, and rows at one place.
    assert list(portable.blocks([9], 4, 512)) == [(0, 1, 0, 10, False)]
    assert list(portable.blocks([7] * 5, 4, 1 << 30)) == [(0, 5, 0, 8, False)]


def test_memory_does_not_grow_with_rows_times_keys():
    n, t = 1200, 4096
    q, k, v = (x[0] for x in gaussian(1, n, t, 2, 1, 16))
    at = torch.randperm(t, generator=torch.Generator().manual_seed(0))[:n].int()
    keys = Keys(k, v, None, torch.zeros(1, dtype=torch.int64), torch.tensor([t], dtype=torch.int32))
    cu_q = torch.tensor([0, n], dtype=torch.int32)
    out, lse = portable.forward(q, keys, at, cu_q, 0.25)
    with torch.profiler.profile(profile_memory=True) as found:
        portable.forward(q, keys, at, cu_q, 0.25)
        portable.backward(out, lse, q, keys, out, lse, at, cu_q, 0.25)
    largest = max(event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]")
    assert 0 < largest < n * t
