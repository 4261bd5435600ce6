"""The Triton stages of MoBA one by one, and composed, on small packs. bfloat16 needs a GPU: interpreted it is wrong."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from attnlab.kernels.moba import launch
from attnlab.kernels.moba import layout as stage
from attnlab.kernels.moba.centroids import centroids
from attnlab.kernels.moba.spec import Spec, geometry, slots
from attnlab.moba import MoBASelection
from attnlab.reference.moba import moba_select
from attnlab.testing import assert_accurate, assert_same_routing
from tests import oracle

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])

# query lengths, key lengths, Hq, Hkv, D, block size, topk, options
CASES = {
    "k=1": ([40], [40], 2, 1, 32, 16, 1, {}),
    "k>=n": ([40], [40], 2, 2, 32, 16, 9, {}),
    "B=1": ([20], [20], 1, 1, 16, 1, 4, {}),
    "B=48, D=80, pack": ([70, 0, 33], [70, 0, 53], 2, 1, 80, 48, 2, {}),
    "B=100, T<B in a pack": ([130, 9], [130, 9], 1, 1, 32, 100, 2, {}),
    "B=512": ([30], [530], 1, 1, 64, 512, 2, {}),
    "B=64, several tiles": ([200], [200], 1, 1, 32, 64, 3, {}),
    "T=1 and T=0": ([1, 0], [1, 0], 2, 1, 16, 16, 3, {}),
    "no query, some keys": ([0, 5], [20, 20], 1, 1, 16, 8, 3, {}),
    "nothing": ([0], [0], 2, 1, 16, 8, 3, {}),
    "gqa 3": ([33], [33], 6, 2, 16, 8, 3, {}),
    "gqa 3, group": ([33], [33], 6, 2, 16, 8, 3, {"group": True}),
    "gqa 8, group, D=5": ([33], [33], 8, 1, 5, 8, 2, {"group": True}),
    "D=96": ([33], [33], 1, 1, 96, 16, 2, {}),
    "D=256": ([33], [33], 1, 1, 256, 16, 2, {}),
    "Tq<Tk": ([7, 3], [60, 41], 2, 1, 16, 8, 3, {}),
    "one query each": ([1, 1, 1], [60, 3, 17], 2, 1, 16, 8, 3, {"group": True}),
    "sink, local": ([60], [60], 1, 1, 16, 8, 3, {"sink": 1, "local": 2}),
    "sink and local overlap": ([30], [30], 2, 1, 16, 8, 2, {"sink": 3, "local": 3}),
    "sinks": ([40], [40], 2, 1, 16, 16, 2, {"sinks": True}),
    "not causal": ([30, 0, 20], [35, 9, 0], 2, 1, 16, 16, 2, {"causal": False, "sinks": True}),
    "not causal, group, sink": ([30], [70], 4, 2, 16, 16, 2, {"causal": False, "group": True, "sink": 1}),
    "negative scale": ([40], [40], 1, 1, 16, 8, 2, {"scale": -0.3}),
    "over 64 blocks": ([80], [80], 1, 1, 16, 1, 3, {}),
}


class Call:
    """Inputs of one call, and what it is checked against."""

    def __init__(self, case, dtype, device="cpu", workspace=2 << 30):
        lq, lk, hq, hkv, d, block_size, topk, options = CASES[case] if isinstance(case, str) else case
        g = torch.Generator().manual_seed(0)
        self.cu_q, self.cu_k = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (lq, lk))
        shapes = (sum(lq), hq, d), (sum(lk), hkv, d), (sum(lk), hkv, d)
        self.q, self.k, self.v = (torch.randn(s, generator=g).to(device, dtype) for s in shapes)
        self.sinks = torch.randn(hq, generator=g).to(device) if options.get("sinks") else None
        scale = options.get("scale", 1 / math.sqrt(d))
        sink, local, group = options.get("sink", 0), options.get("local", 0), options.get("group", False)
        self.spec = Spec(block_size, topk, options.get("causal", True), scale, group, sink, local, workspace)
        self.nslots = slots(self.spec, sum(lk))

    @property
    def geo(self):
        return geometry(self.cu_q, self.cu_k, len(self.q), len(self.k), self.spec.block_size)

    @property
    def options(self):
        routing = {
            "routing": "group" if self.spec.group else "head",
            "causal": self.spec.causal,
            "topk": self.spec.topk,
        }
        extra = {"sink_blocks": self.spec.sink_blocks, "local_blocks": self.spec.local_blocks}
        return (
            routing | extra | {"block_size": self.spec.block_size, "cu_seqlens_q": self.cu_q, "cu_seqlens_k": self.cu_k}
        )

    def select(self):
        return launch.select(self.q, self.k, self.cu_q, self.cu_k, self.spec, self.nslots)

    def forward(self, indices=None, **spec):
        args = (
            self.q,
            self.k,
            self.v,
            self.sinks,
            indices,
            self.cu_q,
            self.cu_k,
            self.spec._replace(**spec),
            self.nslots,
        )
        return launch.forward(*args)

    def attend(self, indices, dtype):
        seen = oracle.mask(indices, self.q, self.k, self.cu_q, self.cu_k, self.spec).to(self.q.device)
        sinks = None if self.sinks is None else self.sinks.to(dtype)
        return oracle.attend(*(x.to(dtype) for x in (self.q, self.k, self.v)), sinks, seen, self.spec.scale)


# Interpreted, the dtypes differ only in rounding: float16 for the cases with the most arithmetic is enough.
HALF = ["B=48, D=80, pack", "gqa 3", "gqa 3, group", "Tq<Tk", "not causal", "D=256"]
RUNS = [(c, t) for c in CASES for t in DTYPES if t == torch.float32 or torch.cuda.is_available() or c in HALF]


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_forward(case, dtype, device):
    call = Call(case, dtype, device)
    indices, scores = call.select()
    assert_same_routing(MoBASelection(indices[None], scores[None]), call.q[None], call.k[None], **call.options)
    out, lse, used = call.forward()
    assert torch.equal(used, indices)
    (truth, truth_lse), (plain, plain_lse) = call.attend(indices, torch.float64), call.attend(indices, dtype)
    # A partial result is rounded once to the inputs' dtype, hence one rounding more.
    assert_accurate(out, truth, plain, roundings=2.0, what="out")
    assert_accurate(lse, truth_lse, plain_lse.float(), roundings=4.0, what="lse")


@pytest.mark.parametrize("block_size", [1, 7, 32, 100])
def test_centroids(block_size, device):
    call = Call(([70, 0, 33], [70, 5, 40], 2, 2, 24, block_size, 2, {}), torch.float16, device)
    found = centroids(call.k, call.geo, call.spec)
    blocks = [b for s in call.k.split(call.cu_k.diff().tolist()) if len(s) for b in s.split(block_size)]
    truth = torch.stack([b.double().mean(0) for b in blocks])
    assert_accurate(found[: len(blocks)], truth, torch.stack([b.float().mean(0) for b in blocks]), roundings=4.0)
    assert not found[len(blocks) :].any()


def scrambled(call, values, seed=0):
    """Small integers: scores are exact in every dtype, and most of them tie."""
    g = torch.Generator().manual_seed(seed)
    for name in ("q", "k"):
        x = getattr(call, name)
        drawn = torch.tensor(values)[torch.randint(len(values), x.shape, generator=g)]
        setattr(call, name, drawn.to(x))
    call.k = call.k[: len(call.k) // 2].repeat(2, 1, 1) if len(call.k) % 2 == 0 else call.k
    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("topk", "options"), [(3, {}), (6, {"group": True, "local": 1}), (20, {"causal": False, "sink": 1})]
)
def test_ties_go_to_the_lowest_block(dtype, topk, options, device):
    call = scrambled(Call(([48], [48], 2, 1, 16, 2, topk, options), dtype, device), [-1.0, -0.0, 0.0, 1.0])
    indices, scores = call.select()
    expected, best = moba_select(call.q[None].double(), call.k[None].double(), **call.options)
    assert torch.equal(indices, expected[0])
    assert torch.equal(scores, best[0].float())


def test_more_picks_than_a_round_holds(device):
    call = scrambled(Call(([40], [40], 1, 1, 16, 1, 36, {}), torch.float32, device), [-1.0, 0.0, 1.0, 2.0])
    indices, _ = call.select()
    assert torch.equal(indices, moba_select(call.q[None].double(), call.k[None].double(), **call.options)[0][0])


def test_keys_outrank_by_value_at_any_size(device):
    call = Call(([20], [20], 1, 1, 16, 1, 8, {}), torch.float32, device)
    call.q = torch.ones_like(call.q)
    call.k = torch.zeros_like(call.k)
    call.k[:, 0, 0] = torch.tensor([3e38, -3e38, 1e-40, -1e-40, 0, -0.0, math.inf, -math.inf, 7, 7] * 2).to(call.k)
    indices, scores = call.select()
    expected, best = moba_select(call.q[None].double(), call.k[None].double(), **call.options)
    assert torch.equal(indices, expected[0])
    assert torch.equal(scores, best[0].float())


def test_nan_stays_in_its_row_and_ranks_first(device):
    call = Call(([40], [40], 2, 1, 16, 4, 3, {}), torch.float32, device)
    clean = call.forward()
    call.q[30, 1] = math.nan
    out, lse, indices = call.forward()
    assert out[30, 1].isnan().all() and lse[30, 1].isnan()
    assert indices[30, 1].tolist() == [7, 0, 1]
    keep = torch.ones(40, 2, dtype=torch.bool)
    keep[30, 1] = False
    assert torch.equal(out[keep], clean[0][keep]) and torch.equal(lse[keep], clean[1][keep])
    call = Call(([40], [40], 2, 1, 16, 4, 3, {}), torch.float32, device)
    call.k[21] = call.k[9] = math.nan
    indices, _ = call.select()
    assert (indices[24:, :, 1:] == torch.tensor([2, 5], device=device)).all()


def counted(indices, geo, spec, hkv, start, end):
    """The layout as a stable sort in numpy."""
    part = indices[start:end].cpu().numpy()
    t, h, slot = np.nonzero(part >= 0)
    keep = slot >= spec.causal
    t, h, slot = t[keep], h[keep], slot[keep]
    base = geo.cu_blocks.cpu().numpy()[geo.query_seq[start:end].cpu().numpy()[t]]
    key = (base + part[t, h, slot]) * hkv + h // (part.shape[1] // hkv)
    pairs = (t * part.shape[1] + h) * part.shape[2] + slot
    sizes = np.bincount(key, minlength=geo.num_blocks * hkv)
    return pairs[np.argsort(key, kind="stable")], np.concatenate([[0], sizes.cumsum()])


@pytest.mark.parametrize(
    ("options", "narrowest", "bounds"),
    [
        ({}, 16, (0, 103)),
        ({}, 128, (37, 90)),
        ({"group": True, "sink": 1}, 32, (37, 90)),
        ({"causal": False}, 128, (0, 103)),
        ({}, 16, (50, 50)),
    ],
)
def test_layout(options, narrowest, bounds, device, monkeypatch):
    monkeypatch.setattr(stage, "NARROWEST", narrowest)
    call = Call(([70, 0, 33], [70, 5, 53], 4, 2, 16, 16, 3, options), torch.float32, device)
    indices, _ = call.select()
    pairs, offsets = stage.layout(indices, call.geo, call.spec, 2, *bounds)
    expected, sizes = counted(indices, call.geo, call.spec, 2, *bounds)
    assert pairs.dtype == offsets.dtype == torch.int32
    assert np.array_equal(offsets.cpu().numpy(), sizes)
    assert np.array_equal(pairs[: sizes[-1]].cpu().numpy(), expected)


@pytest.mark.parametrize("case", ["gqa 3, group", "not causal", "sink, local"])
def test_segments_and_reruns_agree_bitwise(case, device):
    call = Call(case, torch.float16, device)
    whole = call.forward()
    small = call.spec._replace(workspace_bytes=2000)
    each = launch.queries_at_once(call.q, call.k.shape[1], whole[2].shape[1], small, call.nslots)
    assert each < len(call.q) / 2
    for again in (call.forward(), call.forward(workspace_bytes=2000)):
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_replay_in_any_order(device):
    call = Call("sink, local", torch.float32, device)
    indices, _ = call.select()
    out, lse, _ = call.forward()
    shuffled = torch.cat([indices[..., :1], indices[..., 1:].flip(-1)], -1)
    again, again_lse, used = call.forward(shuffled)
    assert torch.equal(used, shuffled)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(again_lse, lse)
    # Fewer slots than the options would give: only the own block.
    alone, _, _ = call.forward(indices[..., :1])
    truth, _ = call.attend(indices[..., :1], torch.float64)
    torch.testing.assert_close(alone.double(), truth, atol=1e-5, rtol=1e-5)


def test_strided_inputs(device):
    call = Call("gqa 3", torch.float32, device)
    expected = call.forward()
    call.q, call.k, call.v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (call.q, call.k, call.v))
    assert all(torch.equal(a, b) for a, b in zip(call.forward(), expected, strict=True))
    call.k = torch.stack([call.k, call.k], -1)[..., 0]
    assert all(torch.equal(a, b) for a, b in zip(call.forward(), expected, strict=True))


@pytest.mark.parametrize("case", ["sinks", "not causal, group, sink"])
def test_backward(case, device):
    call = Call(case, torch.float32, device)
    g = torch.Generator().manual_seed(1)
    call.sinks = torch.randn(call.q.shape[1], generator=g).to(device)
    out, lse, indices = call.forward()
    dout, dlse = (torch.randn(x.shape, generator=g).to(device) for x in (out, lse))
    spec = call.spec._replace(workspace_bytes=20000)
    args = dout, dlse, call.q, call.k, call.v, call.sinks, out, lse, indices, call.cu_q, call.cu_k, spec, call.nslots
    found = launch.backward(*args)

    def gradients(dtype):
        call_ = Call(case, torch.float32, device)
        leaves = [x.to(dtype).requires_grad_() for x in (call.q, call.k, call.v, call.sinks)]
        call_.q, call_.k, call_.v, call_.sinks = leaves
        return torch.autograd.grad(call_.attend(indices, dtype), leaves, (dout.to(dtype), dlse.to(dtype)))

    for name, x, truth, plain in zip(
        ("dq", "dk", "dv", "dsinks"), found, *map(gradients, (torch.float64, torch.float32))
    ):
        assert_accurate(x, truth, plain, roundings=4.0, what=name)
