"""`moba_decode` over a `MoBACache`: any chunking of a sequence gives what one call over all of it gives."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from attnlab.kernels.cpu.moba import decode as native
from attnlab.kernels.moba.decode_portable import decode
from attnlab.kernels.moba.spec import Spec, slots
from attnlab.moba import moba_attention
from attnlab.moba_cache import MoBACache
from attnlab.moba_decoding import DECODE_QUERIES, moba_decode
from attnlab.reference.moba import moba_attention as reference_attention
from attnlab.reference.moba import moba_select as reference_select

KV_HEADS, DIM = 2, 8
ON_CPU = pytest.mark.parametrize("backend", ["portable", "cpu"])


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: block sums and gate scores are exact in any order, and full of ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(batch: int, tokens: int, group: int, seed: int, block_size: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Keys are multiples of 3 where the block size is, so that block means are exact too."""
    heads = (KV_HEADS * group, KV_HEADS, KV_HEADS)
    q, k, v = (integers(batch, tokens, h, DIM, seed=3 * seed + i) for i, h in enumerate(heads))
    return q, k * (3 if block_size % 3 == 0 else 1), v


def truth(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return reference_attention(q.double(), k.double(), v.double(), sinks=sinks, **options)


def indices_of(q: Tensor, cache: MoBACache, options: dict[str, Any], backend: str) -> Tensor:
    """What the gate of a decode kernel chose for the last tokens, `[B, Tq, Hr, slots]`."""
    group = options["routing"] == "group"
    spec = Spec(cache.block_size, options["topk"], True, 1.0, group, options["sink_blocks"], options["local_blocks"], 1)
    tokens = q.shape[1]
    lengths = (cache.device_lengths[:, None] - tokens + 1 + torch.arange(tokens)).flatten().int()
    rows = torch.arange(cache.batch).repeat_interleave(tokens).int()
    places = (cache.k_pages, cache.v_pages, cache.table, cache.sums, rows, lengths, cache.starts)
    run = native if backend == "cpu" else decode
    return run(q.flatten(0, 1), *places, None, spec, slots(spec, cache.capacity))[2].unflatten(0, q.shape[:2])


OPTIONS = st.fixed_dictionaries(
    {
        "topk": st.sampled_from([1, 2, 3, 70]),
        "routing": st.sampled_from(["head", "group"]),
        "sink_blocks": st.integers(0, 2),
        "local_blocks": st.integers(0, 2),
        "scale": st.sampled_from([None, 0.3]),
    }
)


@ON_CPU
@given(
    OPTIONS,
    st.lists(st.integers(0, 3) | st.integers(DECODE_QUERIES - 1, 24), min_size=1, max_size=6),
    st.sampled_from([1, 3, 8, 16, 96]),
    st.sampled_from([None, 1, 5, 8, 32]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 9),
)
def test_any_chunking_equals_one_shot(backend, options, cuts, block_size, page_size, group, with_sinks, seed):
    tokens = sum(cuts)
    q, k, v = inputs(2, tokens, group, seed, block_size)
    sinks = torch.linspace(-1, 2, q.shape[2]) if with_sinks else None
    cache = MoBACache(2, tokens + 3, KV_HEADS, DIM, block_size=block_size, page_size=page_size)
    cache.k_pages.fill_(math.nan)
    cache.v_pages.fill_(math.nan)
    expected, lse = truth(q, k, v, sinks, block_size=block_size, **options)
    gate = {name: value for name, value in options.items() if name != "scale"}
    chosen, _ = reference_select(
        q.double(), k.double(), block_size=block_size, max_blocks=math.ceil(cache.capacity / block_size), **gate
    )
    at = 0
    for n in cuts:
        part = slice(at, at + n)
        cache.append(k[:, part], v[:, part])
        out, part_lse = moba_decode(q[:, part], cache, sinks=sinks, return_lse=True, backend=backend, **options)
        torch.testing.assert_close(out.double(), expected[:, part], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part_lse.double(), lse[:, part], atol=1e-5, rtol=1e-5)
        assert torch.equal(indices_of(q[:, part], cache, options, backend), chosen[:, part])
        at += n
    assert cache.lengths == (tokens, tokens) == tuple(cache.device_lengths.tolist())
    for row in range(2):
        assert torch.equal(cache.keys(row), k[row]) and torch.equal(cache.values(row), v[row])


@ON_CPU
@given(
    OPTIONS,
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 2)), min_size=1, max_size=5),
    st.sampled_from([3, 8]),
    st.sampled_from([None, 5, 8]),
)
def test_ragged_rows_equal_each_alone(backend, options, steps, block_size, page_size):
    totals = [sum(n) for n in zip(*steps, strict=True)]
    q, k, v = inputs(3, max(totals) + 1, 2, 1, block_size)
    cache = MoBACache(3, max(totals) + 1, KV_HEADS, DIM, block_size=block_size, page_size=page_size)
    cache.k_pages.fill_(math.nan)
    cache.v_pages.fill_(math.nan)
    sinks = torch.linspace(-1, 1, q.shape[2])
    done = [0, 0, 0]
    for counts in steps:
        width = max(counts) + 1
        chunk = [torch.full((3, width, *x.shape[2:]), math.nan) for x in (q, k, v)]
        for b, n in enumerate(counts):
            for padded, x in zip(chunk, (q, k, v), strict=True):
                padded[b, :n] = x[b, done[b] : done[b] + n]
        cache.append(*chunk[1:], lengths=counts)
        out, lse = moba_decode(
            chunk[0], cache, q_lengths=counts, sinks=sinks, return_lse=True, backend=backend, **options
        )
        for b, n in enumerate(counts):
            done[b] += n
            rows = [x[b : b + 1, : done[b]] for x in (k, v)]
            own = truth(q[b : b + 1, done[b] - n : done[b]], *rows, sinks, block_size=block_size, **options)
            torch.testing.assert_close(out[b : b + 1, :n].double(), own[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse[b : b + 1, :n].double(), own[1], atol=1e-5, rtol=1e-5)
            assert (out[b, n:] == 0).all() and torch.equal(lse[b, n:], sinks.expand_as(lse[b, n:]))
    assert cache.lengths == tuple(totals)


@ON_CPU
@given(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.lists(st.sampled_from([1, 2, 18]), min_size=1, max_size=6))
def test_left_padding_is_invisible(backend, starts, cuts):
    tokens = sum(cuts)
    q, k, v = inputs(2, tokens, 2, seed=2)
    cache = MoBACache(2, max(tokens, 9), KV_HEADS, DIM, block_size=4, starts=starts)
    at, out, lse = 0, [], []
    for n in cuts:
        cache.append(k[:, at : at + n], v[:, at : at + n])
        found = moba_decode(q[:, at : at + n], cache, topk=2, return_lse=True, backend=backend)
        for whole, part in zip((out, lse), found, strict=True):
            whole.append(part)
        at += n
    out, lse = torch.cat(out, 1), torch.cat(lse, 1)
    for b, start in enumerate(starts):
        start = min(start, tokens)
        assert (out[b, :start] == 0).all() and (lse[b, :start] == -math.inf).all()
        assert cache.lengths[b] == tokens - start and torch.equal(cache.keys(b), k[b, start:])
        own = truth(*(x[b : b + 1, start:] for x in (q, k, v)), None, block_size=4, topk=2)
        torch.testing.assert_close(out[b : b + 1, start:].double(), own[0], atol=1e-5, rtol=1e-5)


@ON_CPU
@pytest.mark.parametrize("page_size", [1, 4, 6, 8, 64])
def test_paged_is_bitwise_contiguous(backend, page_size):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, h, DIM, generator=g) for h in (4, KV_HEADS, KV_HEADS))
    caches = [MoBACache(2, 40, KV_HEADS, DIM, block_size=8, page_size=p) for p in (None, page_size)]
    for at in range(0, 40, 5):
        for cache in caches:
            cache.append(k[:, at : at + 5], v[:, at : at + 5])
        one, other = (moba_decode(q[:, at : at + 5], c, topk=3, backend=backend) for c in caches)
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
@pytest.mark.parametrize("routing", ["head", "group"])
def test_every_backend_decodes(backend, routing, device):
    if backend == "triton":
        pytest.importorskip("triton")
    if backend == "cpu" and device.type != "cpu":
        pytest.skip("the C kernels need cpu")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 24, h, 16, generator=g).to(device) for h in (6, 2, 2))
    cache = MoBACache(3, 40, 2, 16, block_size=4, page_size=8, device=device)
    cache.append(k, v, lengths=[24, 9, 0])
    sinks = torch.linspace(-1, 1, 6).to(device)
    options = dict(topk=3, routing=routing, sink_blocks=1, local_blocks=1)
    last = torch.stack([q[0, 23], q[1, 8], q[2, 0]])[:, None]
    out, lse = moba_decode(last, cache, sinks=sinks, return_lse=True, q_lengths=[1, 1, 0], backend=backend, **options)
    for b, n in ((0, 24), (1, 9)):
        rows = (last[b : b + 1], *(x[b : b + 1, :n] for x in (k, v)))
        expected = truth(*rows, sinks.double(), block_size=4, **options)
        torch.testing.assert_close(out[b : b + 1].double(), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[b : b + 1].double(), expected[1], atol=1e-5, rtol=1e-5)
    assert (out[2] == 0).all() and torch.equal(lse[2, 0], sinks)


@pytest.mark.parametrize(
    "backend, dtype",
    [("portable", torch.float64)] + [(b, t) for b in ("portable", "cpu") for t in (torch.float16, torch.bfloat16)],
)
def test_other_dtypes(backend, dtype):
    q, k, v = (x.to(dtype) for x in inputs(1, 60, 2, seed=3))
    cache = MoBACache(1, 60, KV_HEADS, DIM, block_size=8, dtype=dtype)
    cache.append(k, v)
    out = moba_decode(q[:, -3:], cache, topk=3, backend=backend)
    expected, _ = truth(q[:, -3:], k, v, None, block_size=8, topk=3)
    assert out.dtype == dtype and cache.sums.dtype == torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=4 * eps, rtol=2 * eps)


@pytest.mark.parametrize("decode", [decode, native])
def test_head_major_pages_need_no_copy(decode):
    q, k, v = inputs(2, 50, 2, seed=4)
    spec, lengths, table = Spec(8, 3, True, 0.3, False, 0, 0, 1), torch.tensor([50, 33]).int(), torch.arange(2).int()
    cache = MoBACache(2, 50, KV_HEADS, DIM, block_size=8)
    cache.append(k, v, lengths=lengths)
    flipped = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    rest = (table[:, None], cache.sums, table, lengths, None, None, spec, slots(spec, 50))
    for one, other in zip(decode(q[:, -1], k, v, *rest), decode(q[:, -1], *flipped, *rest), strict=True):
        assert torch.equal(one, other)


@ON_CPU
def test_long_blocks_of_growing_keys(backend):
    """Each stretch of a block has larger scores than the one before, so that what was summed up has to shrink."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 700, h, 16, generator=g) for h in (4, KV_HEADS, KV_HEADS))
    k = k * torch.linspace(0.1, 4.0, 700)[:, None, None]
    cache = MoBACache(1, 700, KV_HEADS, 16, block_size=300)
    cache.append(k, v)
    out, lse = moba_decode(q[:, -1:], cache, topk=2, return_lse=True, backend=backend)
    expected = truth(q[:, -1:], k, v, None, block_size=300, topk=2)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5)


def test_reset_reuses_pages_and_forgets():
    q, k, v = inputs(2, 32, 2, seed=5)
    cache = MoBACache(2, 32, KV_HEADS, DIM, block_size=4, page_size=8, pages=6)
    cache.append(torch.full_like(k, 1e9)[:, :24], v[:, :24])
    assert cache.free_pages == 0
    cache.reset([1])
    assert cache.lengths == (24, 0) and cache.free_pages == 3 and (cache.sums[1] == 0).all()
    cache.reset()
    assert cache.free_pages == 6
    cache.append(k[:, :16], v[:, :16], lengths=[16, 3])
    cache.append(k[:, 16:], v[:, 16:], lengths=[16, 0])
    out = moba_decode(q[:, 16:], cache, topk=2, q_lengths=[16, 0])
    expected, _ = truth(q[:1, 16:], k[:1], v[:1], None, block_size=4, topk=2)
    torch.testing.assert_close(out[:1].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.keys(1), k[1, :3])


@ON_CPU
def test_nan_stays_where_it_is_seen(backend):
    q, k, v = inputs(2, 40, 2, seed=8)
    q[0, -1, 1] = math.nan
    k[1, 5, 0] = math.nan  # block 1 of head 0: its centroid ranks first, and the rows that choose it are NaN
    cache = MoBACache(2, 50, KV_HEADS, DIM, block_size=4)
    cache.append(k, v)
    out, lse = moba_decode(q[:, -1:], cache, topk=2, return_lse=True, backend=backend)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 1] = bad[1, :2] = True
    assert torch.equal(out[:, 0].isnan().all(-1), bad) and torch.equal(lse[:, 0].isnan(), bad)
    assert not out[:, 0][~bad].isnan().any()
    options = dict(topk=2, routing="head", sink_blocks=0, local_blocks=0)
    assert (indices_of(q[:, -1:], cache, options, backend)[1, 0, :2, 1] == 1).all()


@ON_CPU
def test_opcheck(backend):
    q, k, v = inputs(2, 20, 2, seed=9)
    cache = MoBACache(2, 20, KV_HEADS, DIM, block_size=4)
    cache.append(k, v)
    for tokens, sinks, ragged in ((1, None, None), (3, torch.zeros(4), torch.tensor([2, 3]).int())):
        places = (cache.k_pages, cache.v_pages, cache.table, cache.sums, cache.device_lengths, ragged, None, sinks)
        args = (q[:, -tokens:], *places, 4, 2, 0.3, False, 1, 1, 20, backend)
        torch.library.opcheck(torch.ops.attnlab.moba_decode.default, args)


def test_compiled_step_is_traced_once():
    q, k, v = inputs(2, 30, 2, seed=10)
    counter = CompileCounter()
    cache = MoBACache(2, 30, KV_HEADS, DIM, block_size=4)
    cache.append(k[:, :20], v[:, :20])

    @torch.compile(fullgraph=True, backend=counter)
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(k, v)
        return moba_decode(q, cache, topk=3)

    expected = moba_attention(q, k, v, block_size=4, topk=3, backend="reference")
    for t in range(20, 30):
        cache.claim()
        out = step(*(x[:, t : t + 1] for x in (q, k, v)))
        torch.testing.assert_close(out, expected[:, t : t + 1], atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_graph_replay_is_eager(backend):
    q, k, v = (x.cuda() for x in inputs(2, 40, 2, seed=11))
    cache = MoBACache(2, 40, KV_HEADS, DIM, block_size=4, page_size=8, device="cuda")
    cache.append(k[:, :20], v[:, :20])
    step = [x[:, 20:21].clone() for x in (q, k, v)]
    moba_decode(step[0], cache, topk=3, backend=backend)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.write(*step[1:])
        out = moba_decode(step[0], cache, topk=3, backend=backend)
    expected, _ = truth(q, k, v, None, block_size=4, topk=3)
    for t in range(20, 40):
        for held, x in zip(step, (q, k, v), strict=True):
            held.copy_(x[:, t : t + 1])
        cache.claim()
        graph.replay()
        torch.testing.assert_close(out.double(), expected[:, t : t + 1], atol=1e-5, rtol=1e-5)
    assert cache.lengths == (40, 40) == tuple(cache.device_lengths.tolist())


ZEROS = torch.zeros(2, 3, 2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: moba_decode(ZEROS, c, topk=0), ValueError, "moba_decode: topk must be a positive int, got 0"),
        (
            lambda c: moba_decode(ZEROS, c, topk=1, routing="x"),
            ValueError,
            "routing must be 'head' or 'group', got 'x'",
        ),
        (lambda c: moba_decode(ZEROS, c, topk=1, sink_blocks=-1), ValueError, "sink_blocks must be a non-negative int"),
        (lambda c: moba_decode(ZEROS, c, topk=1, sinks=torch.zeros(3)), ValueError, r"sinks must have shape \[2\]"),
        (lambda c: moba_decode(ZEROS[..., :3], c, topk=1), ValueError, r"q must have shape \[2, Tq, Hq, 4\]"),
        (lambda c: moba_decode(ZEROS[:, :, :1], c, topk=1), ValueError, "multiple of the cache's heads 2, got 1"),
        (lambda c: moba_decode(ZEROS.half(), c, topk=1), TypeError, "q must have the cache's dtype"),
        (
            lambda c: moba_decode(ZEROS, c, topk=1, q_lengths=[1.5, 2]),
            TypeError,
            "q_lengths must be a sequence of ints",
        ),
        (lambda c: moba_decode(ZEROS, c, topk=1, q_lengths=[1, 4]), ValueError, "q_lengths must be 2 ints in 0..3"),
        (lambda c: moba_decode(ZEROS, None, topk=1), TypeError, "cache must be a MoBACache, got NoneType"),
        (lambda c: moba_decode(ZEROS, c, topk=1), ValueError, "q holds 3 tokens of row 0, the cache 2"),
        (lambda c: moba_decode(ZEROS[:, :1], c, topk=1, backend="cuda"), ValueError, "backend must be one of 'auto'"),
        (
            lambda c: moba_decode(ZEROS[:, :1].clone().requires_grad_(), c, topk=1),
            ValueError,
            "q must not require a gradient",
        ),
    ],
)
def test_bad_calls(call, error, message):
    cache = MoBACache(2, 8, 2, 4, block_size=2)
    cache.append(ZEROS[:, :2], ZEROS[:, :2])
    with pytest.raises(error, match=message):
        call(cache)
