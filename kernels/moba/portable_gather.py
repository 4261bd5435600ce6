"""Chosen blocks, block by block: the queries that chose a block are gathered and attend it in one kernel call.

A choice of a block by a query is a pair. Pairs are sorted by block; each has its own place among the partial results,
and those of a query are summed in the order of its slots, so results repeat bit for bit.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..states.portable import accumulator, flash, flash_backward
from .portable_gate import Sequence
from .spec import Slots, Spec

PAIR_BYTES = 48  # what a pair takes besides its partial result: sort keys, places, weights


class Pairs(NamedTuple):
    """The pairs of a run of queries with one KV head, in the order of their blocks."""

    rows: slice  # the queries
    source: Tensor  # [live] row of each pair among the run's choices
    place: Tensor  # [choices, slots] int32, where a slot's pair lies; past every pair for an unused slot
    counts: list[int]  # pairs of each block
    keys: list[slice]  # keys of each block


class Workspace:
    """Room for partial results, reused by every run of every head."""

    def __init__(self, indices: Tensor, nslots: Slots, q: Tensor, k: Tensor, room: int) -> None:
        nq, heads, d = q.shape
        self.own, self.slots = nslots.own, nslots.total - nslots.own
        self.choosers = indices.shape[1] // k.shape[1]
        self.width = heads // indices.shape[1]  # query heads that one choice serves
        acc = accumulator(q.dtype)
        per_query = self.choosers * self.slots * (self.width * d * acc.itemsize + PAIR_BYTES)
        self.step = max(1, min(nq, room // max(per_query, 1)))
        self.runs = -(-nq // self.step)
        self.step = -(-nq // max(self.runs, 1))
        self.capacity = self.step * self.choosers * self.slots
        size = (1, 1, (self.capacity + 1) * self.width)
        self.out = torch.empty(*size, d, dtype=acc, device=q.device)
        self.lse = torch.empty(size, dtype=acc, device=q.device)
        self.out[:, :, -self.width :] = 0.0
        self.lse[:, :, -self.width :] = -math.inf

    def segments(self, indices: Tensor, head: int, seqs: list[Sequence], spec: Spec) -> Iterator[Pairs]:
        """Every pair of KV head `head` but those of own slots, a run of queries at a time."""
        if not self.slots:
            return
        block, nq = spec.block_size, indices.shape[0]
        keys = [slice(s.k0 + i, s.k0 + min(i + block, s.nk)) for s in seqs for i in range(0, s.nk, block)]
        lengths = torch.tensor([s.nq for s in seqs], device=indices.device)
        base = torch.tensor([s.block0 for s in seqs], dtype=torch.int32, device=indices.device)
        base = base.repeat_interleave(lengths)[:, None, None]
        for a in range(0, nq, self.step):
            rows = slice(a, min(a + self.step, nq))
            chosen = indices[rows, head * self.choosers : (head + 1) * self.choosers, self.own :]
            yield self._sort(torch.where(chosen < 0, len(keys), chosen + base[rows]), rows, keys)

    def _sort(self, chosen: Tensor, rows: slice, keys: list[slice]) -> Pairs:
        flat = chosen.flatten()
        if len(keys) <= torch.iinfo(torch.int16).max:
            flat = flat.to(torch.int16)  # half the passes of a radix sort
        counts = torch.bincount(flat, minlength=len(keys) + 1)[: len(keys)].tolist()
        order = flat.sort(stable=True).indices
        live = order[: sum(counts)]
        place = torch.full(flat.shape, self.capacity, dtype=torch.int32, device=flat.device)
        place.scatter_(0, live, torch.arange(len(live), dtype=torch.int32, device=flat.device))
        source = live.div(self.slots, rounding_mode="floor")
        return Pairs(rows, source, place.view(-1, self.slots), counts, keys)

    def where(self, pairs: Pairs) -> Tensor:
        """[queries * heads, slots] where each query head's partial results lie."""
        if self.width == 1:
            return pairs.place
        serve = torch.arange(self.width, dtype=torch.int32, device=pairs.place.device)[:, None]
        return (pairs.place[:, None] * self.width + serve).flatten(0, 1)

    def choices(self, x: Tensor) -> Tensor:
        """Rows of a run `[queries, heads, ...]` as one row per choice `[choices, width * ...]`."""
        return x.reshape(x.shape[0] * self.choosers, -1)

    def lists(self, pairs: Pairs, k: Tensor, v: Tensor) -> Iterator[tuple]:
        """Per chosen block: its pairs' rows, its keys and values [1, 1, m, d], its pairs' places in out and lse."""
        sizes = [c * self.width for c in pairs.counts]
        used = sum(sizes)
        split = zip(
            pairs.source.split(pairs.counts),
            self.out[:, :, :used].split(sizes, 2),
            self.lse[:, :, :used].split(sizes, 2),
            pairs.keys,
            strict=True,
        )
        k, v = k[None, None, :, 0], v[None, None, :, 0]
        for source, out, lse, keys in split:
            if source.numel():
                yield source, k[:, :, keys], v[:, :, keys], out, lse, keys


def forward(
    pairs: Pairs, work: Workspace, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> None:
    """Merge the states over every gathered block into `out [Nq, G, D]` and `lse` of one KV head."""
    d = q.shape[2]
    rows = work.choices(q[pairs.rows])
    for source, kb, vb, part, part_lse, _ in work.lists(pairs, k, v):
        o, x = flash(rows.index_select(0, source).view(1, 1, -1, d), kb, vb, False, scale)
        part.copy_(o)
        part_lse.copy_(x)
    where = work.where(pairs)
    out, lse = out[pairs.rows].view(-1, d), lse[pairs.rows].view(-1, 1)
    found = work.lse.view(-1).index_select(0, where.view(-1)).view(where.shape)
    lses = torch.cat([lse, found], 1)
    total = lses.logsumexp(1, keepdim=True)
    weights = lses.sub_(total.masked_fill(total == -math.inf, 0.0)).exp_()
    summed = F.embedding_bag(where, work.out.view(-1, d), per_sample_weights=weights[:, 1:].contiguous(), mode="sum")
    out.copy_(summed.addcmul_(out, weights[:, :1]))
    lse.copy_(total)


def backward(
    pairs: Pairs,
    work: Workspace,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Add the gradients through every gathered block of one KV head into `grads`."""
    dq, dk, dv = grads
    d = q.shape[2]
    rows = work.choices(torch.cat([x[pairs.rows] for x in (q, dout, out)], -1))
    row_lse = work.choices(lse[pairs.rows])
    row_dlse = None if dlse is None else work.choices(dlse[pairs.rows])
    for source, kb, vb, part, _, keys in work.lists(pairs, k, v):
        qr, do, o = rows.index_select(0, source).view(1, 1, -1, 3 * d).split(d, -1)
        x = row_lse.index_select(0, source).view(1, 1, -1)
        dx = None if row_dlse is None else row_dlse.index_select(0, source).view(1, 1, -1)
        gq, gk, gv = flash_backward(do, dx, qr, kb, vb, o, x, False, scale)
        part.copy_(gq)
        dk[keys, 0] += gk[0, 0]
        dv[keys, 0] += gv[0, 0]
    summed = F.embedding_bag(work.where(pairs), work.out.view(-1, d), mode="sum")
    dq[pairs.rows] += summed.view(dq[pairs.rows].shape)
