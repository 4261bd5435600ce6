"""Selective attention from C kernels for CPUs, with the signature of the portable backend's.

No result depends on the number of threads: rows sum keys in one order, and where a request's keys are split over items,
the split follows from the call alone.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..fusionrag.spec import Keys, sort_rows
from ..moba.spec import cdiv
from .module import ELEMENTS, call, dense

FEW_ROWS = 6  # rows (queries times heads of a group) that read keys where they lie: packing them costs more
SPLIT_ROWS = 512  # requests of at most so many rows are split by keys, else by rows
SPAN = 1024  # keys of one item of a request that is split
PART_BYTES = 64 << 20  # of the states that are merged
LEAST_ROWS, MOST_ROWS = 256, 16384  # of one item of a request split by rows: packing pays, their state fits the caches
ITEMS = 8  # of each thread, the longest first, so that none waits long for another


def forward(q: Tensor, keys: Keys, positions: Tensor, cu_q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [Nq, Hq, D] in q's dtype and lse [Nq, Hq] float32. Raises ValueError where a page or a key does not exist."""
    q, k, v = dense(q), dense(keys.k), dense(keys.v)
    (nq, hq, dim), hkv, threads = q.shape, k.shape[-2], torch.get_num_threads()
    out, lse = torch.empty(q.shape, dtype=torch.float32), torch.empty(nq, hq, dtype=torch.float32)
    if not nq:
        return out.to(q.dtype), lse
    table, cos, sin = (None if x is None else x.contiguous() for x in (keys.table, keys.cos, keys.sin))
    if table is None:
        k, v = k[None], v[None]
    positions, cu_q, starts, lengths = (x.contiguous() for x in (positions, cu_q, keys.starts, keys.lengths))
    order = sort_rows(positions, cu_q)
    units, items, rows = _plan(positions[order], cu_q.tolist(), hq, hkv, dim, threads)
    parts = torch.empty(rows, hq, dim + 2, dtype=torch.float32) if rows else None
    call(
        "selective", q, k, v, table, starts, lengths, cos, sin, positions, order, cu_q, units, items, out, lse, parts,
        ELEMENTS[q.dtype], len(units), hq, hkv, dim, *k.shape[:2], 0 if table is None else table.shape[1],
        0 if cos is None else cos.shape[1], int(keys.interleaved), *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        float(scale), threads,
    )  # fmt: skip
    return out.to(q.dtype), lse


def _plan(reached: Tensor, cu: list[int], hq: int, hkv: int, dim: int, threads: int) -> tuple[Tensor, Tensor, int]:
    """Units of work as selective.c has them, the longest first, int32 [n, 7]; items before each and all, int32 [n + 1];
    and how many states are to be merged. `reached [Nq]`: the sorted positions."""
    group = hq // hkv
    chunk = max(1, max(LEAST_ROWS, min(MOST_ROWS, cdiv(cu[-1] * hq, ITEMS * threads))) // group)
    parts = []  # request, its rows [begin, end), whether its keys are split
    for request, (start, stop) in enumerate(pairwise(cu)):
        split = (stop - start) * group <= SPLIT_ROWS
        step = max(1, stop - start) if split else chunk
        parts += [(request, i, min(i + step, stop - start), split) for i in range(0, stop - start, step)]
    reach = (reached[[cu[request] + end - 1 for request, _, end, _ in parts]] + 1).tolist()
    span = _span([(end - begin, n) for (_, begin, end, split), n in zip(parts, reach, strict=True) if split], hq, dim)
    found, states = [], 0
    for (request, begin, end, split), n in zip(parts, reach, strict=True):
        rows, keys = end - begin, max(1, min(span, n) if split else n)
        few, spans = split and rows * group <= FEW_ROWS, max(1, cdiv(n, keys))
        cost, items = (keys * rows * hkv, spans) if few else (keys * rows, spans * hkv)
        found.append((cost, items, (request, begin, end, n, keys, few, states)))
        states += spans * rows if spans > 1 else 0
    found.sort(key=lambda unit: -unit[0])
    before = torch.tensor([0, *(items for _, items, _ in found)]).cumsum(0).int()
    return torch.tensor([unit for _, _, unit in found], dtype=torch.int32), before, states


def _span(splits: list[tuple[int, int]], hq: int, dim: int) -> int:
    """Keys of one item of requests with so many rows and keys, so that the states they leave are not too many."""
    span, most = SPAN, PART_BYTES // (4 * hq * (dim + 2))
    while sum(rows * cdiv(n, span) for rows, n in splits if n > span) > most:
        span *= 2
    return span
