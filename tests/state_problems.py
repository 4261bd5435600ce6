"""States to merge and tokens to append, in every layout, with the answers in float64 and in plain PyTorch."""

import math

import torch
from torch import Tensor

from attnlab.testing import assert_accurate

FP8 = torch.float8_e4m3fn


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of `x` elsewhere: "dense", "aligned" (gaps of 16 bytes), "odd" (gaps and a base of one element)."""
    if layout == "dense":
        return x.clone()
    pad, start = (16, 0) if layout == "aligned" else (3, 1)
    room = torch.full((*x.shape[:-1], x.shape[-1] + pad), 7.0).to(x.dtype)
    view = room[..., start : start + x.shape[-1]]
    view.copy_(x)
    return view


def merged(outs: Tensor, lses: Tensor, factors=None, base2=False, indptr=None, dtype=torch.float64) -> tuple:
    """The definition, row by row of `indptr` or all at once: softmax of the lses, weighted sum, in `dtype`."""
    if indptr is not None:
        cuts = zip(indptr.tolist(), indptr.tolist()[1:], strict=False)
        rows = [(outs[a:b], lses[a:b], None if factors is None else factors[a:b]) for a, b in cuts]
        found = [merged(o, x, f, base2, dtype=dtype) for o, x, f in rows]
        return tuple(torch.cat(x) for x in zip(*found, strict=True))
    x = lses.to(dtype)
    empty = x.isinf()
    x = x if factors is None else x * factors.to(dtype)[:, None, None]
    x = x.masked_fill(empty, -math.inf) * (math.log(2) if base2 else 1.0)
    lse = x.logsumexp(0) if len(x) else x.new_full(x.shape[1:], -math.inf)
    weights = (x - lse.masked_fill(lse == -math.inf, 0.0)).exp()
    out = torch.where(weights[..., None] == 0, 0.0, outs.to(dtype) * weights[..., None]).sum(0)
    return out, lse / (math.log(2) if base2 else 1.0)


class States:
    """`n` states of `[m, h, d]`, some rows empty, their outs NaN. With `counts` entries `[sum, 1, h, d]` in runs."""

    def __init__(self, n, m, h, d, dtype=torch.float32, to=None, layout="dense", counts=None, seed=0, **options):
        g = torch.Generator().manual_seed(seed)
        shape = (n, m, h, d) if counts is None else (sum(counts), 1, h, d)
        self.indptr = None if counts is None else torch.tensor([0, *counts]).cumsum(0)
        outs, lses = torch.randn(shape, generator=g), torch.randn(shape[:-1], generator=g) * 4
        drawn = torch.rand(shape[:-1], generator=g)
        lses[drawn < 0.1], lses[drawn > 0.9] = -math.inf, math.inf
        lses[:, :1, -1] = math.inf  # rows without any key
        outs[lses.isinf()] = math.nan
        self.factors = torch.rand(shape[0], generator=g) * 2 + 0.25 if options.get("factors") else None
        self.base2, self.scale = options.get("base2", False), None
        to = to or dtype
        if to == FP8:
            self.scale = torch.tensor([0.02])
        self.outs, self.lses = laid_out(outs.to(dtype), layout), lses
        if layout != "dense":
            self.lses = lses.transpose(1, 2).contiguous().transpose(1, 2)
        rows = m if counts is None else len(counts)
        self.out = laid_out(torch.full((rows, h, d), math.nan).to(to), layout)
        self.lse = laid_out(torch.full((rows, h), math.nan), layout)

    def run(self, merge):
        merge(self.outs, self.lses, self.factors, self.indptr, self.base2, self.out, self.lse, self.scale)
        return self.out, self.lse

    def expected(self, dtype=torch.float64):
        return merged(self.outs, self.lses, self.factors, self.base2, self.indptr, dtype)

    def check(self, merge):
        (out, lse), truth, plain = self.run(merge), self.expected(), self.expected(torch.float32)
        if self.scale is not None:
            check_fp8(out, truth[0], plain[0], self.scale)
        else:
            assert_accurate(out, truth[0], plain[0].to(out.dtype), what="out")
        assert_accurate(lse, truth[1], plain[1], what="lse")


def check_fp8(out: Tensor, truth: Tensor, plain: Tensor, scale: Tensor) -> None:
    """Half a step from the truth, but for what float32 may err; nearly always the code of plain PyTorch."""
    exact = (truth / scale.double()).clamp(-448, 448)
    step = 2.0 ** exact.abs().clamp(min=2.0**-6).log2().floor() / 8
    slack = 2 * (plain - truth).abs().max() / scale + torch.finfo(torch.float32).eps * exact.abs().max()
    assert ((out.double() - exact).abs() <= step / 2 + slack).all()
    assert (out.float() != (plain / scale).clamp(-448, 448).to(FP8).float()).float().mean() < 1e-3


class Tokens:
    """A state `[m, hq, d]`, some rows empty, and a query's own key and value."""

    def __init__(self, m, hq, hkv, d, dtype=torch.float32, state=None, to=None, layout="dense", base2=False, seed=0):
        g = torch.Generator().manual_seed(seed)
        make = lambda *shape: laid_out(torch.randn(shape, generator=g).to(dtype), layout)
        self.q, self.k, self.v = make(m, hq, d), make(m, hkv, d), make(m, hkv, d)
        self.before = laid_out(torch.randn(m, hq, d, generator=g).to(state or dtype), layout)
        self.lse_before = torch.randn(m, hq, generator=g)
        self.lse_before[0, 0], self.lse_before[-1, -1], self.lse_before[m // 2, 0] = -math.inf, math.inf, -1e4
        self.before[self.lse_before.isinf()] = math.nan
        self.scale, self.base2 = d**-0.5, base2
        self.out = laid_out(torch.full((m, hq, d), math.nan).to(to or dtype), layout)
        self.lse = laid_out(torch.full((m, hq), math.nan), layout)

    def run(self, append):
        append(self.before, self.lse_before, self.q, self.k, self.v, self.scale, self.base2, self.out, self.lse)
        return self.out, self.lse

    def expected(self, dtype=torch.float64):
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (self.k, self.v))
        score = (self.q.to(dtype) * k).sum(-1) * (self.scale / (math.log(2) if self.base2 else 1.0))
        outs, lses = torch.stack([self.before.to(dtype), v]), torch.stack([self.lse_before.to(dtype), score])
        return merged(outs, lses, base2=self.base2, dtype=dtype)

    def check(self, append):
        truth, plain = self.expected(), self.expected(torch.float32)
        out, lse = self.run(append)
        assert_accurate(out, truth[0], plain[0].to(out.dtype), what="out")
        assert_accurate(lse, truth[1], plain[1], roundings=2, what="lse")


def guarded(x: Tensor) -> bool:
    """Whether the gaps of a tensor that `laid_out` made hold what they held."""
    room = x.new_empty(0).set_(x.untyped_storage()).float()
    inside = torch.zeros(len(room), dtype=torch.bool).as_strided(x.shape, x.stride(), x.storage_offset())
    inside.fill_(True)
    mask = inside.new_empty(0).set_(inside.untyped_storage())
    return bool((room[~mask] == 7.0).all())
