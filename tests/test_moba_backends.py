"""Every backend of `moba_attention` and `moba_select`, forward and gradients, against the float64 reference."""

import math

import pytest
import torch

import attnlab
from attnlab.testing import (
    assert_accurate,
    assert_same_routing,
    clustered,
    gaussian,
    one_hot,
    plain_attention,
    planted_needle,
    ragged,
    selection_mask,
    tied,
)

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
# The Triton interpreter computes bfloat16 wrongly, so its bfloat16 kernels are tested on a GPU only.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["portable", "triton"] + (["cuda"] if HAS_CUDA else ["cpu"])

# tq, tk, heads, kv_heads, head_dim, block_size, options
CASES = {
    "k=1": (70, 70, 2, 2, 32, 16, dict(topk=1)),
    "k=3": (70, 70, 2, 2, 32, 16, dict(topk=3)),
    "k>=n": (70, 70, 2, 1, 32, 16, dict(topk=9)),
    "B=1": (40, 40, 2, 1, 16, 1, dict(topk=4)),
    "B=48": (150, 150, 1, 1, 64, 48, dict(topk=2)),
    "B=64, T multiple": (128, 128, 1, 1, 64, 64, dict(topk=2)),
    "B=100": (230, 230, 1, 1, 32, 100, dict(topk=2)),
    "T<B": (20, 20, 2, 1, 32, 512, dict(topk=2)),
    "T=0": (0, 0, 2, 1, 32, 16, dict(topk=2)),
    "T=1": (1, 1, 2, 1, 32, 16, dict(topk=2)),
    "gqa 3": (50, 50, 6, 2, 32, 8, dict(topk=3)),
    "gqa 8, group": (50, 50, 8, 1, 32, 8, dict(topk=3, routing="group")),
    "gqa 2, group": (50, 50, 4, 2, 32, 8, dict(topk=3, routing="group")),
    "D=80": (50, 50, 2, 1, 80, 16, dict(topk=2)),
    "D=256": (50, 50, 1, 1, 256, 16, dict(topk=2)),
    "D=5": (50, 50, 2, 1, 5, 16, dict(topk=2)),
    "Tq<Tk": (13, 70, 2, 1, 32, 16, dict(topk=3)),
    "one query": (1, 70, 2, 1, 32, 16, dict(topk=3)),
    "not causal": (50, 70, 2, 1, 32, 16, dict(topk=3, causal=False)),
    "not causal, Tq>Tk": (70, 50, 2, 1, 32, 16, dict(topk=2, causal=False, sink_blocks=1)),
    "sink and local": (90, 90, 2, 1, 32, 8, dict(topk=2, sink_blocks=1, local_blocks=2)),
    "sink and local overlap": (40, 40, 2, 1, 32, 8, dict(topk=2, sink_blocks=3, local_blocks=3)),
    "over 64 blocks": (140, 140, 1, 1, 16, 2, dict(topk=5)),
    "over 64 selected": (150, 150, 1, 1, 16, 2, dict(topk=70)),
}

# The interpreter is slow: there, each kind of case runs in float32, and these few in float16 and with sinks as well.
FEW = ("k=3", "B=48", "T=0", "gqa 2, group", "D=80", "Tq<Tk", "not causal", "sink and local")


def every_case(*, sinks=(False,)):
    """`(backend, dtype, sinks, name)`."""
    for backend in BACKENDS:
        for dtype in DTYPES:
            for sink in sinks:
                for name in CASES:
                    plain = dtype == torch.float32 and not sink
                    few = name in FEW and dtype != torch.bfloat16 and (dtype == torch.float32) == sink
                    if HAS_CUDA or backend != "triton" or plain or few:
                        tag = [backend, str(dtype)[6:], *(["sinks"] if sink else []), name]
                        yield pytest.param(backend, dtype, sink, name, id="-".join(tag))


def case(name, dtype, make=clustered):
    tq, tk, heads, kv_heads, d, block_size, options = CASES[name]
    x = make(gaussian(2, tq, tk, heads, kv_heads, d, dtype=dtype), block_size)
    return x, dict(block_size=block_size, **options)


def move(x, device=DEVICE):
    return [t.to(device) for t in x]


@pytest.mark.parametrize("backend, dtype, _, name", every_case())
def test_select(backend, dtype, _, name):
    (q, k, _), options = case(name, dtype)
    found = attnlab.moba_select(*move((q, k)), backend=backend, **options)
    assert_same_routing(attnlab.MoBASelection(*move(found, "cpu")), q, k, **options)


@pytest.mark.parametrize("backend, dtype, sinks, name", every_case(sinks=(False, True)))
def test_attention(backend, dtype, sinks, name):
    """Routing is replayed from the reference, so that a near tie cannot pass for an error of the attention."""
    (q, k, v), options = case(name, dtype)
    logits = torch.linspace(-1.0, 2.0, q.shape[2], dtype=dtype) if sinks else None
    truth = [x.double().requires_grad_() for x in (q, k, v, *([logits] if sinks else []))]
    chosen = attnlab.moba_select(*truth[:2], backend="reference", **options)
    mask = selection_mask(chosen.indices, q.shape[2], k.shape[1], options["block_size"], options.get("causal", True))
    wanted = plain_attention(*truth[:3], mask, None, *truth[3:])
    plain = [x.detach().to(dtype).requires_grad_() for x in truth]
    rough = plain_attention(*plain[:3], mask, None, *plain[3:])
    actual = [x.detach().to(DEVICE, dtype).requires_grad_() for x in truth]
    options |= dict(selection=attnlab.MoBASelection(*move(chosen)), sinks=actual[3] if sinks else None)
    found = attnlab.moba_attention(*actual[:3], return_lse=True, backend=backend, **options)
    g = torch.Generator().manual_seed(1)
    douts = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in wanted]
    for outputs, inputs in ((wanted, truth), (rough, plain), (found, actual)):
        torch.autograd.backward(
            outputs, [d.to(o.device, o.dtype) for d, o in zip(douts, outputs, strict=True)], inputs=inputs
        )
    for what, a, t, p in zip(("out", "lse"), found, wanted, rough, strict=True):
        assert_accurate(a.detach().cpu(), t.detach(), p.detach(), what=what)
    # The backward recomputes the weights from the stored lse: its rounding is |lse| times that of a weight near 1.
    roundings = 8.0 + float(wanted[1].detach().abs().max()) if wanted[1].numel() else 8.0
    for what, a, t, p in zip(("dq", "dk", "dv", "dsinks"), actual, truth, plain, strict=False):
        assert_accurate(a.grad.cpu(), t.grad, p.grad, roundings=roundings, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ["head", "group"])
def test_end_to_end(backend, routing):
    """Routing and attention together, on keys whose blocks are far apart."""
    x, _ = planted_needle(gaussian(1, 96, 96, 4, 2, 32), 16)
    options = dict(block_size=16, topk=2, routing=routing)
    want = attnlab.moba_attention(*(t.double() for t in x), backend="reference", **options)
    found = attnlab.moba_attention(*move(x), backend=backend, **options).cpu()
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make", [lambda x: tied(x, 8), lambda x: tied(x, 8, period=1), one_hot], ids=["pairs", "all", "one-hot"]
)
def test_exact_ties(backend, make):
    q, k, _ = make(gaussian(1, 75, 75, 2, 1, 16))
    options = dict(block_size=8, topk=4)
    want = attnlab.moba_select(q.double(), k.double(), backend="reference", **options)
    found = attnlab.moba_select(*move((q, k)), backend=backend, **options)
    assert torch.equal(found.indices.cpu(), want.indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scores(backend):
    x = clustered(gaussian(1, 60, 60, 2, 1, 16, scale=100.0), 8)
    want = attnlab.moba_attention(*(t.double() for t in x), block_size=8, topk=3, backend="reference")
    found = attnlab.moba_attention(*move(x), block_size=8, topk=3, backend=backend).cpu()
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ["head", "group"])
def test_pack(backend, routing):
    lengths_q, lengths_k = [30, 0, 1, 7, 33], [30, 5, 1, 40, 33]
    cu = [c.to(DEVICE) for c in ragged(lengths_q, lengths_k)]
    q, _, _ = gaussian(1, sum(lengths_q), 1, 4, 2, 16)
    _, k, v = gaussian(1, 1, sum(lengths_k), 4, 2, 16)
    options = dict(block_size=8, topk=3, routing=routing)
    inputs = [x.to(DEVICE).requires_grad_() for x in (q, k, v)]
    packed = attnlab.moba_attention(*inputs, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], backend=backend, **options)
    grads = torch.autograd.grad(packed.square().sum(), inputs)
    for s, _ in enumerate(lengths_q):
        rows, keys = (slice(int(c[s]), int(c[s + 1])) for c in cu)
        parts = [
            x.detach()[:, r].double().cpu().requires_grad_() for x, r in zip(inputs, (rows, keys, keys), strict=True)
        ]
        want = attnlab.moba_attention(*parts, backend="reference", **options)
        torch.testing.assert_close(packed[:, rows].double().cpu(), want, rtol=1e-5, atol=1e-5)
        for g, w, r in zip(grads, torch.autograd.grad(want.square().sum(), parts), (rows, keys, keys), strict=True):
            torch.testing.assert_close(g[:, r].double().cpu(), w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable_and_segments_agree(backend):
    x = [t.to(DEVICE).requires_grad_() for t in clustered(gaussian(2, 120, 120, 2, 1, 16), 8)]

    def run(**options):
        out = attnlab.moba_attention(*x, block_size=8, topk=3, backend=backend, **options)
        return out, *torch.autograd.grad(out.square().sum(), x)

    first, second, segmented = run(), run(), run(workspace_bytes=4096)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, segmented, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_where_it_should(backend):
    x = gaussian(1, 64, 64, 1, 1, 16)
    x.q[0, 40] = math.nan
    out = attnlab.moba_attention(*move(x), block_size=8, topk=2, backend=backend).cpu()
    assert out[0, 40].isnan().all() and out[0, :40].isfinite().all() and out[0, 41:].isfinite().all()
    x = gaussian(1, 64, 64, 1, 1, 16)
    x.k[0, 17] = math.nan
    out = attnlab.moba_attention(*move(x), block_size=8, topk=2, backend=backend).cpu()
    assert out[0, :16].isfinite().all() and out[0, 24:].isnan().all()
    assert (attnlab.moba_select(*move(x[:2]), block_size=8, topk=2, backend=backend).indices[0, 24:, 0, 1] == 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    """q, k, v as transformers hands them over: `[B, H, T, D]` transposed, and slices of one fused projection."""
    x = clustered(gaussian(2, 40, 40, 2, 2, 16), 8)
    fused = torch.cat(move(x), -1).split(16, -1)
    transposed = [t.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    want = attnlab.moba_attention(*move(x), block_size=8, topk=3, backend=backend)
    for inputs in (fused, transposed):
        assert torch.equal(attnlab.moba_attention(*inputs, block_size=8, topk=3, backend=backend), want)
