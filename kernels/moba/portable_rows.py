"""Chosen blocks, query by query: a query's keys, own block included, are gathered and attended in one masked softmax.

For tiny blocks, and for few queries, where lists of queries per block would be short.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .portable_gate import Sequence
from .spec import Spec

CHUNK_BYTES = 8 << 20  # gathered keys held at a time, and as much again for values


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, seqs: list[Sequence], spec: Spec, acc: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Queries, rows of `k` seen as [Nk * Hkv, D], their validity [t, g, r, keys], and q, k, v [t, g, r, ..., d]."""
    d, hkv, block, device = q.shape[2], k.shape[1], spec.block_size, q.device
    lengths = torch.tensor([s.nq for s in seqs], device=device)
    start, stop, last = (
        torch.tensor(x, dtype=torch.int64, device=device).repeat_interleave(lengths)
        for x in ([s.k0 for s in seqs], [s.k0 + s.nk for s in seqs], [s.k0 + s.nk - s.nq - s.q0 for s in seqs])
    )
    if spec.causal:
        stop = last + torch.arange(len(q), device=device) + 1
    k, v = (x.reshape(-1, d) for x in (k, v))
    step = max(1, CHUNK_BYTES // (indices[0].numel() * block * d * acc.itemsize))
    head = torch.arange(hkv, device=device)[:, None, None]
    for a in range(0, len(q), step):
        rows = slice(a, min(a + step, len(q)))
        index = indices[rows].unflatten(1, (hkv, -1))[..., None]
        key = start[rows, None, None, None, None] + index * block + torch.arange(block, device=device)
        seen = (index >= 0) & (key < stop[rows, None, None, None, None])
        seen, key = seen.flatten(-2), key.flatten(-2)
        at = (key * hkv + head).masked_fill_(~seen, 0)
        kc, vc = (x.index_select(0, at.flatten()).to(acc).view(*at.shape, d) for x in (k, v))
        for x in (kc, vc):
            x.masked_fill_(~seen[..., None], 0.0)
        yield rows, at, seen, q[rows].to(acc).view(*at.shape[:3], -1, d), kc, vc


def forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, seqs: list[Sequence], spec: Spec, out: Tensor, lse: Tensor
) -> None:
    """Write the state over every chosen block into `out` and `lse`."""
    for rows, _, seen, qc, kc, vc in _chunks(q, k, v, indices, seqs, spec, lse.dtype):
        s = _scores(qc, kc, seen, spec.scale)
        x = s.logsumexp(-1, keepdim=True)
        p = s.sub_(x.masked_fill(x == -math.inf, 0.0)).exp_()
        out[rows] = (p @ vc).view(out[rows].shape)
        lse[rows] = x.view(lse[rows].shape)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    seqs: list[Sequence],
    spec: Spec,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients through every chosen block into `grads`."""
    acc, d = lse.dtype, q.shape[2]
    dq, dk, dv = grads
    sums = [torch.zeros(x.numel() // d, d, dtype=acc, device=x.device) for x in (k, v)]
    for rows, at, seen, qc, kc, vc in _chunks(q, k, v, indices, seqs, spec, acc):
        do, o = (x[rows].to(acc).view(qc.shape) for x in (dout, out))
        x = lse[rows].masked_fill(lse[rows] == -math.inf, 0.0).view(*qc.shape[:-1], 1)
        p = _scores(qc, kc, seen, spec.scale).sub_(x).exp_()
        shift = (do * o).sum(-1, keepdim=True)
        shift = shift if dlse is None else shift - dlse[rows].view(shift.shape)
        ds = (do @ vc.mT).sub_(shift).mul_(p).mul_(spec.scale)
        dq[rows] = (ds @ kc).view(dq[rows].shape)
        for total, g in zip(sums, (ds.mT @ qc, p.mT @ do), strict=True):
            _add_rows(total, at.flatten(), g.view(-1, d))
    dk.copy_(sums[0].view(k.shape))
    dv.copy_(sums[1].view(v.shape))


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    return (q @ k.mT).mul_(scale).masked_fill_(~seen[..., None, :], -math.inf)


def _add_rows(total: Tensor, at: Tensor, x: Tensor) -> None:
    """Add rows `x` at places that may repeat, in a fixed order."""
    if total.is_cuda:
        total.index_put_((at,), x, accumulate=True)
    else:
        total.index_add_(0, at, x)
