"""`token_importance` on every backend against an explicit softmax in float64."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab import BackendError, explain
from attnlab.fusionrag import token_importance
from attnlab.kernels import configs
from attnlab.kernels.fusionrag import portable_importance
from attnlab.testing import assert_accurate, gaussian

BACKENDS = ["reference", "portable", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(b, t) for b in BACKENDS for t in DTYPES if b != "triton" or t != torch.bfloat16 or torch.cuda.is_available()]
PAIRS += [("reference", torch.float64), ("portable", torch.float64)]

# batch, question tokens, context, heads, kv_heads, head_dim, chunks, question lengths
CASES = {
    "plain": (1, 9, 70, 2, 2, 16, [0, 20, 37, 70], None),
    "one chunk": (2, 5, 40, 4, 2, 32, [0, 40], None),
    "inside": (1, 7, 50, 3, 1, 16, [4, 21, 44], None),
    "ragged": (3, 10, 40, 2, 1, 16, [[0, 10, 10, 40], [7, 7, 30, 31], [0, 0, 0, 0]], [10, 3, 2]),
    "empty questions": (2, 4, 20, 2, 1, 16, [0, 9, 20], [0, 4]),
    "gqa 3, odd head": (1, 7, 45, 6, 2, 40, [1, 2, 3, 45], [7]),
    "largest head": (1, 3, 33, 2, 1, 256, [0, 16, 33], None),
    "no keys": (1, 3, 0, 2, 1, 16, [0, 0], None),
    "no question": (1, 0, 10, 2, 1, 16, [0, 10], None),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    real = configs.get
    monkeypatch.setattr(configs, "get", lambda *key: real(*key) | {"BLOCK_M": 16, "BLOCK_N": 16})


def explicit(q, k, chunks, q_lengths, normalize, scale=None):
    """The softmax held whole, in the inputs' dtype."""
    (batch, tq, hq, dim), tk = q.shape, k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    found = torch.zeros(batch, tk, dtype=torch.promote_types(q.dtype, torch.float32))
    for b in range(batch):
        bounds = chunks[b] if isinstance(chunks[0], list) else chunks
        scores = torch.einsum("ihd,jhd->hij", q[b], k[b].repeat_interleave(hq // k.shape[2], 1)) * scale
        scores = scores[:, : tq if q_lengths is None else q_lengths[b]]
        j = torch.arange(tk)
        spans = itertools.pairwise(bounds) if normalize == "chunk" else [(bounds[0], bounds[-1])]
        for start, end in spans:
            inside = (j >= start) & (j < end)
            if inside.any():
                weights = scores.masked_fill(~inside, -math.inf).softmax(-1)
                found[b] += weights.to(found.dtype).sum((0, 1))
    return found


def call(q, k, chunks, q_lengths, **options):
    ragged = isinstance(chunks[0], list)
    chunks = torch.tensor(chunks, dtype=torch.int32, device=q[0].device) if ragged else chunks
    return token_importance(q, k, chunks, q_lengths=q_lengths, **options)


@pytest.mark.parametrize("normalize", ["chunk", "context"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
def test_equals_the_softmax_held_whole(backend, dtype, case, normalize, device):
    *shape, chunks, q_lengths = CASES[case]
    q, k, _ = gaussian(*shape, dtype=dtype, device=device, scale=1.5)
    found = call(q, k, chunks, q_lengths, normalize=normalize, backend=backend)
    assert found.shape == k.shape[:2] and found.dtype == torch.promote_types(dtype, torch.float32)
    truth = explicit(q.double().cpu(), k.double().cpu(), chunks, q_lengths, normalize)
    plain = explicit(q.cpu(), k.cpu(), chunks, q_lengths, normalize)
    if dtype == torch.float64:
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    elif truth.numel():
        assert_accurate(found.cpu(), truth, plain)
        single = explicit(q.float().cpu(), k.float().cpu(), chunks, q_lengths, normalize)
        assert_accurate(found.cpu(), truth, single, roundings=8)  # products of half precision are exact in float32
    for b in range(shape[0]):  # every row of probabilities sums to one
        bounds = chunks[b] if isinstance(chunks[0], list) else chunks
        rows = shape[3] * (shape[1] if q_lengths is None else q_lengths[b])
        spans = itertools.pairwise(bounds) if normalize == "chunk" else [(bounds[0], bounds[-1])]
        for start, end in spans:
            total = found[b, start:end].sum().item()
            assert total == pytest.approx(rows * (end > start), rel=1e-5)
        assert (found[b, : bounds[0]] == 0).all() and (found[b, bounds[-1] :] == 0).all()


@pytest.mark.parametrize("normalize", ["chunk", "context"])
@pytest.mark.parametrize("scale", [0.0, -0.7, 30.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_scale(backend, scale, normalize, device):
    q, k, _ = gaussian(2, 5, 40, 4, 2, 16, device=device)
    found = token_importance(q, k, [0, 15, 40], normalize=normalize, scale=scale, backend=backend).cpu()
    args = ([0, 15, 40], None, normalize, scale)
    assert_accurate(found, explicit(q.cpu().double(), k.cpu().double(), *args), explicit(q.cpu(), k.cpu(), *args))


@pytest.mark.parametrize("normalize", ["chunk", "context"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_are_summed(backend, normalize, device):
    layers = [gaussian(2, 5, 40, 4, 2, 16, device=device, seed=seed) for seed in range(2)]
    q, k = [x.q for x in layers], tuple(x.k for x in layers)
    found = call(q, k, [[0, 15, 40], [2, 3, 30]], [5, 2], normalize=normalize, backend=backend).cpu()
    args = ([[0, 15, 40], [2, 3, 30]], [5, 2], normalize)
    truth = sum(explicit(x.q.cpu().double(), x.k.cpu().double(), *args) for x in layers)
    assert_accurate(found, truth, sum(explicit(x.q.cpu(), x.k.cpu(), *args) for x in layers))


@pytest.mark.parametrize("normalize", ["chunk", "context"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_only_what_counts(backend, normalize, device):
    """Keys outside the chunks and queries past a question's end may hold NaN, and rows may lie anywhere."""
    q, k, _ = gaussian(2, 6, 50, 4, 2, 16, device=device)
    wanted = call(q, k, [[3, 20, 41], [0, 9, 9]], [4, 6], normalize=normalize, backend=backend)
    dirty_q = torch.full((2, 4, 6, 20), torch.nan, device=device).transpose(1, 2)[..., 2:18]
    dirty_k = torch.full((2, 2, 50, 24), torch.nan, device=device).transpose(1, 2)[..., 8:]
    for b, rows, start, end in ((0, 4, 3, 41), (1, 6, 0, 9)):
        dirty_q[b, :rows], dirty_k[b, start:end] = q[b, :rows], k[b, start:end]
    found = call(dirty_q, dirty_k, [[3, 20, 41], [0, 9, 9]], [4, 6], normalize=normalize, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    dirty_k[0, 30] = torch.nan
    found = call(dirty_q, dirty_k, [[3, 20, 41], [0, 9, 9]], [4, 6], normalize=normalize, backend=backend)
    spoiled = torch.zeros_like(found, dtype=torch.bool)
    spoiled[0, (20 if normalize == "chunk" else 3) : 41] = True
    assert torch.equal(found.isnan(), spoiled)


class Largest(TorchDispatchMode):
    """The most elements a tensor made meanwhile holds, views aside."""

    def __init__(self):
        self.found = 0
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.found = max(self.found, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("normalize", ["chunk", "context"])
@pytest.mark.parametrize("elements", [1, 700, 5000])
def test_never_holds_all_scores(elements, normalize, monkeypatch):
    q, k, _ = gaussian(1, 10, 300, 8, 2, 2)
    chunks = [0, 100, 290, 300]
    wanted = token_importance(q.double(), k.double(), chunks, normalize=normalize)
    monkeypatch.setattr(portable_importance, "SCORE_ELEMENTS", elements)
    with Largest() as largest:
        found = token_importance(q, k, chunks, normalize=normalize)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert largest.found <= max(elements, q.numel(), k.numel()) < 10 * 300 * 8


def test_same_again_bit_for_bit(device):
    q, k, _ = gaussian(2, 10, 50, 4, 2, 16, device=device, dtype=torch.float16)
    first, second = (token_importance([q, q], [k, k], [0, 31, 50], backend="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, device):
    q, k, _ = gaussian(2, 3, 20, 4, 2, 16, device=device)
    chunks = torch.tensor([0, 8, 20], dtype=torch.int32, device=device)
    lengths = torch.tensor([3, 1], dtype=torch.int32, device=device)
    op = torch.ops.attnlab.token_importance.default
    torch.library.opcheck(op, (chunks, [q, q], [k, k], lengths, True, 0.25, backend))
    torch.library.opcheck(op, (chunks.expand(2, -1), [q], [k], None, False, 0.25, backend))


def test_scores_carry_no_gradient_and_ignore_autocast():
    q, k, _ = gaussian(1, 3, 20, 4, 2, 16)
    wanted = token_importance(q, k, [0, 20])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_importance(q, k, [0, 20]), wanted)
    assert not token_importance(q.requires_grad_(), k, [0, 20]).requires_grad


def test_compiles_whole():
    q, k, _ = gaussian(1, 3, 20, 4, 2, 16)
    fn = torch.compile(lambda q, k: token_importance([q], [k], [0, 8, 20]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(q, k), token_importance(q, k, [0, 8, 20]))


def test_values_are_checked_once(device, monkeypatch):
    q, k, _ = gaussian(2, 3, 20, 4, 2, 16, device=device)
    chunks, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 8, 20], [3, 2]))
    reads, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(1) or real(x))

    def count(**options):
        before = len(reads)
        token_importance(q, k, backend="triton", **options)
        return len(reads) - before

    assert [count(chunks=chunks, q_lengths=lengths), count(chunks=chunks, q_lengths=lengths)] == [2, 0]
    assert count(chunks=[0, 8, 20], q_lengths=[3, 2]) == 0
    lengths[1] = 4
    with pytest.raises(ValueError, match=r"q_lengths must be in 0..3, got \[3, 4\]"):
        count(chunks=chunks, q_lengths=lengths)


def test_explain():
    q, k, _ = gaussian(1, 3, 20, 4, 2, 16)
    assert explain(token_importance, q, k, [0, 20]).chosen == "portable"
    big = torch.zeros(1, 3, 1, 257)
    with pytest.raises(BackendError, match="head size 257 is over 256"):
        token_importance(big, big, [0, 3], backend="triton")


Q, K, _ = gaussian(2, 3, 20, 4, 2, 8)
INTS = "must be a sequence of ints or an integer tensor of one dimension"


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = [
    (dict(q=None), TypeError, "q must be a Tensor or a sequence of them, got NoneType"),
    (dict(k=[K, 3]), TypeError, "k must be a Tensor or a sequence of them, got int"),
    (dict(q=[]), ValueError, "q must have at least one layer, got none"),
    (dict(q=[Q, Q]), ValueError, "k must have as many layers as q 2, got 1"),
    (dict(q=[Q, Q[:, :2]], k=[K, K]), ValueError, "every layer's q must have shape [2, 3, 4, 8], got [2, 2, 4, 8]"),
    (
        dict(q=[Q, Q.half()], k=[K, K.half()]),
        TypeError,
        "every layer's q must be torch.float32 on cpu, got torch.float1",
    ),
    (dict(q=Q[0]), ValueError, "q must have shape [B, T, H, D], got [3, 4, 8]"),
    (dict(k=K.half()), TypeError, "k must have q's dtype float32, got float16"),
    (dict(k=K[..., :4]), ValueError, "k must have q's head size 8, got 4"),
    (dict(q=Q[:, :, :3]), ValueError, "q's heads must be a multiple of k's heads 2, got 3"),
    (dict(chunks=3), TypeError, f"chunks {INTS}, got 3"),
    (dict(chunks=[0, 1.5]), TypeError, f"chunks {INTS}, got [0, 1.5]"),
    (dict(chunks=[0]), ValueError, "chunks must be C + 1 offsets of at least one chunk, got [0]"),
    (dict(chunks=[0, 9, 8]), ValueError, "chunks must never fall, from 0 or later to at most 20, got [0, 9, 8]"),
    (dict(chunks=[-1, 9]), ValueError, "chunks must never fall, from 0 or later to at most 20, got [-1, 9]"),
    (dict(chunks=[0, 21]), ValueError, "chunks must never fall, from 0 or later to at most 20, got [0, 21]"),
    (dict(chunks=i32(0, 21)), ValueError, "chunks must never fall, from 0 or later to at most 20, got [0, 21]"),
    (
        dict(chunks=i32([0, 20], [5, 4])),
        ValueError,
        "chunks must never fall, from 0 or later to at most 20, got [5, 4]",
    ),
    (
        dict(chunks=i32(0, 20).long()),
        TypeError,
        "chunks must be a sequence of ints or an int32 Tensor, got torch.int64",
    ),
    (dict(chunks=i32(0)), ValueError, "chunks must have shape [C + 1] or [2, C + 1], got [1]"),
    (dict(chunks=i32([0, 20])), ValueError, "chunks must have shape [C + 1] or [2, C + 1], got [1, 2]"),
    (dict(chunks=i32(0, 20).to("meta")), ValueError, "chunks must be on q's device cpu, got meta"),
    (dict(q_lengths=[1]), ValueError, "q_lengths must be 2 ints, got [1]"),
    (dict(q_lengths=[1, 4]), ValueError, "q_lengths must be in 0..3, got [1, 4]"),
    (dict(q_lengths=i32(-1, 2)), ValueError, "q_lengths must be in 0..3, got [-1, 2]"),
    (dict(q_lengths=i32(1)), ValueError, "q_lengths must have shape [2], got [1]"),
    (
        dict(q_lengths=torch.ones(2)),
        TypeError,
        "q_lengths must be a sequence of ints or an int32 Tensor, got torch.flo",
    ),
    (dict(normalize="token"), ValueError, "normalize must be 'chunk' or 'context', got 'token'"),
    (dict(scale="1"), TypeError, "scale must be a number or None, got str"),
    (dict(backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', 'portable', 'reference', got 'cuda'"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[row[2][:60] for row in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error) as caught:
        token_importance(**dict(q=Q, k=K, chunks=[0, 20]) | change)
    assert str(caught.value).startswith("token_importance: ") and message in str(caught.value)
