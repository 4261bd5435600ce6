"""The CUDA C++ gate and layout, run on the CPU thread by thread, against the reference and against numpy."""

import math

import numpy as np
import pytest
import torch

from attnlab.kernels.cuda import moba
from attnlab.kernels.moba.spec import Geometry, Slots, Spec, geometry, slots
from attnlab.reference.moba import moba_select
from tests.cuda_emulation.emulate import COMPILER

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the emulation with")

BASE = Spec(16, 4, True, 1.0, False, 0, 0, 1 << 30)


def pack(lengths_q, lengths_k, spec: Spec) -> tuple[Geometry, Slots, torch.Tensor, torch.Tensor]:
    cu_q, cu_k = (torch.tensor([0, *np.cumsum(x)], dtype=torch.int32) for x in (lengths_q, lengths_k))
    geo = geometry(cu_q, cu_k, sum(lengths_q), sum(lengths_k), spec.block_size)
    return geo, slots(spec, max(lengths_k)), cu_q, cu_k


def means(k, geo: Geometry, spec: Spec) -> torch.Tensor:
    """Centroids by block; NaN where the upper bound counts a block that is none."""
    c = torch.full((geo.num_blocks, *k.shape[1:]), float("nan"))
    for start, end, block in zip(geo.cu_k.tolist(), geo.cu_k.tolist()[1:], geo.cu_blocks.tolist(), strict=False):
        for i, keys in enumerate(k[start:end].float().split(spec.block_size) if end > start else ()):
            c[block + i] = keys.mean(0)
    return c


def draw(lengths_q, lengths_k, hq, hkv, d, dtype, exact=True, seed=0):
    """q and k; `exact`: small integers, so that float32 sums have no rounding and ties abound."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (sum(lengths_q), hq, d), (sum(lengths_k), hkv, d)
    if exact:
        return tuple(torch.randint(-2, 3, s, generator=rng).to(dtype) for s in shapes)
    return tuple(torch.randn(s, generator=rng).to(dtype) for s in shapes)


def expected(q, k, spec: Spec, cu_q, cu_k):
    return moba_select(
        q[None], k[None], block_size=spec.block_size, topk=spec.topk, causal=spec.causal, cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k, routing="group" if spec.group else "head", sink_blocks=spec.sink_blocks,
        local_blocks=spec.local_blocks, max_blocks=-(-int(cu_k.diff().max()) // spec.block_size),
    )  # fmt: skip


def check_gate(q, k, spec: Spec, lengths_q, lengths_k, exact=True):
    geo, nslots, cu_q, cu_k = pack(lengths_q, lengths_k, spec)
    indices, scores = moba.gate(q, means(k, geo, spec), geo, spec, nslots, True)
    want_indices, want_scores = (x[0] for x in expected(q, k, spec, cu_q, cu_k))
    assert indices.shape == want_indices.shape
    if exact:
        assert torch.equal(indices, want_indices)
    tolerance = 0 if exact else 1e-5
    torch.testing.assert_close(scores, want_scores.float(), equal_nan=True, rtol=tolerance, atol=tolerance)
    return indices


CASES = {
    "own only": (BASE._replace(topk=1), [70], [70], 2, 2, 16),
    "ties": (BASE, [130], [130], 2, 1, 16),
    "all blocks": (BASE._replace(topk=50), [100], [100], 1, 1, 8),
    "rounds": (BASE._replace(block_size=2, topk=72), [190], [190], 1, 1, 4),
    "block of one": (BASE._replace(block_size=1, topk=9), [90], [90], 2, 1, 3),
    "odd sizes": (BASE._replace(block_size=7, topk=5), [97], [97], 3, 1, 80),
    "odd head": (BASE._replace(block_size=4), [66], [66], 2, 2, 33),
    "widest head": (BASE._replace(block_size=8), [65], [65], 1, 1, 256),
    "one element": (BASE._replace(block_size=8), [65], [65], 1, 1, 1),
    "pack": (BASE._replace(block_size=8), [30, 0, 1, 77, 9], [30, 5, 1, 77, 40], 4, 2, 16),
    "late queries": (BASE._replace(block_size=8), [5], [90], 2, 2, 32),
    "uneven warps": (BASE._replace(block_size=1, topk=9), [1] * 12, [1, 90] * 6, 1, 1, 4),
    "group": (BASE._replace(block_size=8, group=True), [40, 60], [40, 70], 6, 2, 24),
    "not causal": (BASE._replace(block_size=8, causal=False), [33, 20], [50, 7], 2, 1, 16),
    "not causal, no keys": (BASE._replace(causal=False), [3, 4], [0, 20], 2, 1, 16),
    "sink and local": (BASE._replace(block_size=4, sink_blocks=2, local_blocks=3), [80], [80], 2, 1, 16),
    "sink past the end": (BASE._replace(sink_blocks=99, local_blocks=2), [80], [80], 1, 1, 16),
    "not causal, sink": (BASE._replace(causal=False, sink_blocks=2), [20, 9], [90, 10], 2, 1, 16),
}


NARROW = ("ties", "odd sizes", "odd head", "widest head", "pack", "group")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(case, t) for case in NARROW for t in (torch.float16, torch.bfloat16)],
)
def test_gate_equals_reference(emulated, case, dtype):
    spec, lengths_q, lengths_k, hq, hkv, d = CASES[case]
    q, k = draw(lengths_q, lengths_k, hq, hkv, d, dtype)
    sizes = [1] if spec.causal else [n % spec.block_size or 1 for n in lengths_k]
    k = k * math.lcm(spec.block_size, *sizes)  # keeps the means of all candidates whole
    check_gate(q, k, spec, lengths_q, lengths_k)


@pytest.mark.parametrize("group", [False, True])
def test_gate_on_gaussian_scores(emulated, group):
    spec = BASE._replace(block_size=5, topk=40, group=group)
    q, k = draw([210], [210], 2, 1, 48, torch.float32, exact=False)
    check_gate(q, k, spec, [210], [210], exact=False)


def test_gate_reads_strided_and_unaligned_queries(emulated):
    lengths = [70]
    q, k = draw(lengths, lengths, 3, 1, 20, torch.float16)
    for view in (
        torch.zeros(70, 3, 27, dtype=q.dtype)[..., 1:21],
        torch.zeros(3, 70, 24, dtype=q.dtype).transpose(0, 1)[..., :20],
    ):
        view.copy_(q)
        check_gate(view, k * 16, BASE, lengths, lengths)


def test_gate_ranks_nan_first_and_ties_zeros(emulated):
    spec = BASE._replace(block_size=1, topk=4)
    q, k = torch.ones(9, 1, 1), torch.tensor([0.0, -0.0, float("nan"), float("-inf"), 0.0, 3.0, 0.0, 0.0, 0.0])
    indices = check_gate(q, k[:, None, None], spec, [9], [9])
    assert indices[8, 0].tolist() == [8, 2, 5, 0]
    assert indices[2, 0].tolist() == [2, 0, 1, -1]


def test_gate_without_scores_or_queries(emulated):
    q, k = draw([40], [40], 1, 1, 8, torch.float32)
    geo, nslots, _, _ = pack([40], [40], BASE)
    centroids = means(k, geo, BASE)
    indices, scores = moba.gate(q, centroids, geo, BASE, nslots, False)
    assert scores is None
    assert torch.equal(indices, moba.gate(q, centroids, geo, BASE, nslots, True)[0])
    geo, nslots, _, _ = pack([0], [40], BASE)
    assert moba.gate(q[:0], centroids, geo, BASE, nslots, True)[0].shape == (0, 1, nslots.total)


def sorted_pairs(indices, geo: Geometry, spec: Spec, nslots: Slots, hkv, start, stop):
    """The layout by a stable sort over keys."""
    segment = indices[start:stop].numpy().astype(np.int64)
    first, seq = geo.cu_blocks.numpy(), geo.query_seq[start:stop].numpy()
    head = np.arange(segment.shape[1])[None, :, None] * hkv // segment.shape[1]
    keys = (first[seq][:, None, None] + segment) * hkv + head
    end = (geo.query_pos // spec.block_size if spec.causal else geo.cu_blocks.diff()[geo.query_seq]).numpy()[start:stop]
    live = (segment >= 0) & (segment < end[:, None, None]) & (np.arange(nslots.total) >= nslots.own)
    pairs = np.flatnonzero(live)
    keys = keys.reshape(-1)[pairs]
    counts = np.bincount(keys, minlength=geo.num_blocks * hkv)
    return pairs[np.argsort(keys, kind="stable")], np.concatenate([[0], np.cumsum(counts)])


@pytest.mark.parametrize("case", CASES)
def test_layout_is_the_stable_sort(emulated, case):
    spec, lengths_q, lengths_k, hq, hkv, d = CASES[case]
    q, k = draw(lengths_q, lengths_k, hq, hkv, d, torch.float32)
    geo, nslots, cu_q, cu_k = pack(lengths_q, lengths_k, spec)
    indices = expected(q, k, spec, cu_q, cu_k)[0][0]
    for start, end in ((0, len(q)), (0, 0), (len(q) // 3, len(q) - 1)):
        check_layout(indices, geo, spec, nslots, hkv, start, max(end, start))


def check_layout(indices, geo, spec, nslots, hkv, start, end):
    pairs, offsets = moba.layout(indices, geo, spec, hkv, start, end)
    want_pairs, want_offsets = sorted_pairs(indices, geo, spec, nslots, hkv, start, end)
    assert pairs.dtype == offsets.dtype == torch.int32
    assert pairs.numel() == (end - start) * indices.shape[1] * nslots.total
    assert offsets.tolist() == want_offsets.tolist()
    assert pairs[: offsets[-1]].tolist() == want_pairs.tolist()


@pytest.mark.parametrize("case", ["pack", "group", "sink and local"])
def test_layout_has_the_bits_of_the_triton_one(emulated, device, case):
    triton_layout = pytest.importorskip("attnlab.kernels.moba.layout", reason="needs triton").layout
    if device.type == "cuda":
        pytest.skip("with a GPU the kernels themselves are compared")
    spec, lengths_q, lengths_k, hq, hkv, d = CASES[case]
    q, k = draw(lengths_q, lengths_k, hq, hkv, d, torch.float32)
    geo, nslots, cu_q, cu_k = pack(lengths_q, lengths_k, spec)
    indices = expected(q, k, spec, cu_q, cu_k)[0][0]
    arguments = (indices, geo, spec, hkv, 0, len(q))
    (pairs, offsets), (want_pairs, want_offsets) = moba.layout(*arguments), triton_layout(*arguments)
    assert torch.equal(offsets, want_offsets)
    assert torch.equal(pairs[: offsets[-1]], want_pairs[: offsets[-1]])


def test_layout_walks_many_chunks_of_a_replayed_choice(emulated):
    """Replayed slots come in any order, with gaps, and may crowd one block; no block past the end counts."""
    spec = BASE._replace(block_size=64, topk=6)
    geo, nslots, _, _ = pack([150, 500], [150, 500], spec)
    rng = torch.Generator().manual_seed(3)
    indices = torch.randint(-2, 3, (650, 4, nslots.total), generator=rng, dtype=torch.int32)
    indices[300:, :, 1] = 0
    check_layout(indices, geo, spec, nslots, 2, 0, 650)
    check_layout(indices[:, :, : nslots.total], geo, spec, nslots, 4, 31, 650)
    beyond = indices.clone()
    beyond[:, 1, 2] = 1 << 20
    indices[:, 1, 2] = -1
    got, want = (moba.layout(x, geo, spec, 2, 0, 650) for x in (beyond, indices))
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0][: got[1][-1]], want[0][: want[1][-1]])


@pytest.mark.parametrize("case", ["pack", "uneven warps"])
def test_thread_order_does_not_matter(emulated, case):
    """The same bits with threads run in rising and in falling order: no barrier is missing."""
    spec, lengths_q, lengths_k, hq, hkv, d = CASES[case]
    q, k = draw(lengths_q, lengths_k, hq, hkv, d, torch.float32, exact=False)
    geo, nslots, _, _ = pack(lengths_q, lengths_k, spec)
    results = []
    for emulated.falling in (False, True):
        indices, scores = moba.gate(q, means(k, geo, spec), geo, spec, nslots, True)
        pairs, offsets = moba.layout(indices, geo, spec, hkv, 0, len(q))
        results.append((indices, scores, pairs[: offsets[-1]], offsets))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
