"""The gate in plain PyTorch: exact top-k of query-centroid scores in chunks of queries, never `[H, T, n]`.

The order is falling score, then rising block; -0 equals 0; NaN is above everything. A fast path finds it for rows
without near ties. For the others a score and its block number make one int64 key, and such keys are unique.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Slots, Spec, cdiv

CHUNK_SCORES = 1 << 20  # scores held at a time: few enough for the caches, enough that calls cost little
CHUNK_TOKENS = 64  # fewest queries per chunk, so that tiny blocks do not mean as many steps
MOST_ROUNDS = 32  # up to here one maximum after another is faster than torch.topk
TOP_INDEX = 2**31 - 1
LEAST_SCORE = torch.finfo(torch.float32).min


class Sequence(NamedTuple):
    """One sequence of a pack: its rows, and the number of its first block among all blocks of the pack."""

    q0: int
    nq: int
    k0: int
    nk: int
    block0: int


def sequences(cu_q: Tensor, cu_k: Tensor, block_size: int) -> list[Sequence]:
    bq, bk = cu_q.tolist(), cu_k.tolist()
    found, block0 = [], 0
    for q0, q1, k0, k1 in zip(bq, bq[1:], bk, bk[1:], strict=False):
        found.append(Sequence(q0, q1 - q0, k0, k1 - k0, block0))
        block0 += cdiv(k1 - k0, block_size)
    return found


def route(
    q: Tensor, k: Tensor, seqs: list[Sequence], spec: Spec, nslots: Slots, want_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """Slots of every query: int32 indices [Nq, Hr, slots] and, if wanted, float32 scores of that shape."""
    shape = (q.shape[0], k.shape[1] if spec.group else q.shape[1], nslots.total)
    indices = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    scores = torch.full(shape, -math.inf, device=q.device) if want_scores else None
    for seq in seqs:
        if seq.nq and seq.nk:
            rows = slice(seq.q0, seq.q0 + seq.nq)
            _rules(indices[rows], seq, spec, nslots)
            if scores is not None:
                scores[rows].masked_fill_(indices[rows] >= 0, math.inf)
            _picks(q, k, indices, scores, seq, spec, nslots)
    return indices, scores


def _rules(indices: Tensor, seq: Sequence, spec: Spec, nslots: Slots) -> None:
    """Fill the slots that need no score."""
    device = indices.device
    sink = torch.arange(nslots.sink, device=device)
    if not spec.causal:
        indices[:, :, : nslots.sink] = sink.masked_fill(sink >= cdiv(seq.nk, spec.block_size), -1)
        return
    own = torch.arange(seq.nk - seq.nq, seq.nk, device=device)[:, None] // spec.block_size
    local = own - 1 - torch.arange(nslots.local, device=device)
    row = [own, sink.expand(seq.nq, -1).masked_fill(sink >= own, -1), local.masked_fill(local < nslots.sink, -1)]
    indices[:, :, : nslots.total - nslots.picks] = torch.cat(row, 1)[:, None]


def centroids(k: Tensor, block_size: int) -> Tensor:
    """Block means of one sequence `[T, g, d]`, the last block's over the keys it has: [n, g, d] float32 (float64)."""
    acc = torch.promote_types(k.dtype, torch.float32)
    full = k.shape[0] // block_size
    means = [k[: full * block_size].unflatten(0, (full, block_size)).mean(1, dtype=acc)] if full else []
    if k.shape[0] % block_size:
        means.append(k[full * block_size :].mean(0, keepdim=True, dtype=acc))
    return torch.cat(means)


def _picks(
    q: Tensor, k: Tensor, indices: Tensor, scores: Tensor | None, seq: Sequence, spec: Spec, nslots: Slots
) -> None:
    """Fill the slots that go to the best candidates."""
    block, first, before = spec.block_size, nslots.sink, seq.nk - seq.nq
    n = cdiv(seq.nk, block)
    most = (seq.nk - 1) // block - nslots.local if spec.causal else n
    if not nslots.picks or most <= first:
        return
    means = centroids(k[seq.k0 : seq.k0 + min(most * block, seq.nk)], block)[first:most].transpose(0, 1).contiguous()
    step = max(CHUNK_TOKENS, CHUNK_SCORES // (indices.shape[1] * (most - first)))
    slot = nslots.total - nslots.picks
    for a in range(0, seq.nq, step):
        b = min(a + step, seq.nq)
        rows = slice(seq.q0 + a, seq.q0 + b)
        stop = (before + b - 1) // block - nslots.local if spec.causal else n
        if stop <= first:
            continue
        s = _affinity(q[rows], means[:, : stop - first], spec.group)
        limit = None
        if spec.causal and (before + a) // block - nslots.local < stop:
            limit = torch.arange(before + a, before + b, device=q.device) // block - nslots.local - first
            limit = limit.repeat_interleave(s.shape[2] // (b - a))
            lowest = max((before + a) // block - nslots.local - first, 0)
            late = torch.arange(lowest, s.shape[1], device=q.device)[:, None] >= limit
            s[:, lowest:].masked_fill_(late, -math.inf)
        index, value = _best(s, min(nslots.picks, s.shape[1]), limit, scores is not None)
        index += first
        if limit is not None:
            empty = torch.arange(index.shape[1], device=q.device)[:, None] >= limit
            index.masked_fill_(empty, -1)
        kept = slice(slot, slot + index.shape[1])
        for target, x in ((indices, index), (scores, value)):
            if target is not None:
                if limit is not None and x is value:
                    x = x.masked_fill(empty, -math.inf)
                target[rows, :, kept] = x.unflatten(2, (b - a, -1)).permute(2, 0, 3, 1).flatten(1, 2)


def _affinity(q: Tensor, means: Tensor, group: bool) -> Tensor:
    """Scores [g, n, tokens * heads of the group that choose] of queries `[t, h, d]` and centroids `[g, n, d]`."""
    q = q.to(means.dtype).unflatten(1, (means.shape[0], -1))
    q = q.sum(2, keepdim=True) if group else q
    return means @ q.transpose(0, 1).flatten(1, 2).mT


def _best(s: Tensor, count: int, limit: Tensor | None, want_scores: bool) -> tuple[Tensor, Tensor | None]:
    """The `count` best along dim 1 of scores `[g, n, rows]`, in order: indices and scores [g, count, rows].

    Column i has `limit[i]` candidates; the order of what is past them does not matter.
    """
    if s.dtype == torch.float64:
        value, index = s.sort(dim=1, descending=True, stable=True)
        return index[:, :count], value[:, :count]
    if s.device.type == "cpu" and count <= MOST_ROUNDS:
        index, unsure = _rounds(s, count, limit)
        g, row = unsure.nonzero(as_tuple=True)
        if len(g):
            index[g, :, row] = _exact(s[g, :, row].T, count).T
    else:
        index = torch.cat([_exact(x, count)[None] for x in s])
    return index, s.gather(1, index) if want_scores else None


def _rounds(s: Tensor, count: int, limit: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_best`'s indices by one maximum after another, and the columns [g, rows] where they may be wrong.

    The low bits of a score make room for its index, so a maximum brings its index along. What that can spoil shows:
    neighbours in the order that are equal without those bits, or a NaN, which infinities become as well.
    """
    n = s.shape[1]
    low = (1 << max(n - 1, 1).bit_length()) - 1
    index = torch.arange(n, dtype=torch.int32, device=s.device)[:, None]
    packed = s.clamp(min=LEAST_SCORE).view(torch.int32).bitwise_and_(~low).bitwise_or_(index).view(torch.float32)
    seen = min(count + 1, n)
    best = torch.empty(s.shape[0], seen, s.shape[2], device=s.device)
    for i in range(seen):
        top = torch.amax(packed, 1, keepdim=True, out=best[:, i : i + 1])
        if i + 1 < seen:
            packed.scatter_(1, top.view(torch.int32).bitwise_and(low).clamp_(max=n - 1).to(torch.int64), -math.inf)
    odd = best.sum(1).isnan()
    bits = best.view(torch.int32)
    found = bits[:, :count].bitwise_and(low).clamp_(max=n - 1).to(torch.int64)
    coarse = bits.bitwise_and_(~low).view(torch.float32)
    close = coarse[:, 1:] == coarse[:, :-1]
    if limit is not None:
        close &= torch.arange(1, seen, device=s.device)[:, None] < limit
    return found, close.any(1) | odd


def _exact(s: Tensor, count: int) -> Tensor:
    """Indices [count, rows] of the best along dim 0 of `s [n, rows]`, whatever it holds."""
    bits = (s + 0.0).view(torch.int32).masked_fill_(s.isnan(), 0x7FC00000)
    bits ^= (bits >> 31).bitwise_and_(TOP_INDEX)
    block = torch.arange(TOP_INDEX, TOP_INDEX - len(s), -1, device=s.device)[:, None]
    keys = bits.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(block)
    return TOP_INDEX - (keys.topk(count, 0).values & TOP_INDEX)
