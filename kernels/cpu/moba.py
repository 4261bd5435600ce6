"""MoBA from C kernels for CPUs: gate, attention and decode, with the signatures of the portable backend's.

Gradients are the portable backend's.
"""

import torch
from torch import Tensor

from ..moba.portable import backward
from ..moba.spec import Slots, Spec, cdiv
from ..states.portable import add_sinks
from .module import ELEMENTS, call

__all__ = ["backward", "decode", "forward", "select"]

GATE_CHUNK = 1024  # queries of one item, as in gate.c
LANES = 16  # the widest vectors: rows of a state are a multiple of them
CHUNK_ROWS = 16384  # rows (queries times heads of a group) of one item of the attention: their state fits the caches


def select(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, spec: Spec, nslots: Slots, want_scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Blocks of every query, int32 [Nq, Hr, slots], and, if wanted, their float32 scores."""
    q, k = _dense(q), _dense(k)
    (nq, hq, dim), hkv = q.shape, k.shape[1]
    hr = hkv if spec.group else hq
    indices = torch.empty(nq, hr, nslots.total, dtype=torch.int32)
    scores = torch.empty(indices.shape) if want_scores else None
    cu_blocks = _offsets(cdiv(cu_k.diff(), spec.block_size))
    means = torch.empty(int(cu_blocks[-1]), hkv, dim)
    sequences, threads, strides = len(cu_q) - 1, torch.get_num_threads(), (k.stride(0), k.stride(1))
    if nslots.picks:
        shape = (sequences, hkv, dim, spec.block_size, *strides, threads)
        call("centroids", k, cu_k, cu_blocks, means, ELEMENTS[k.dtype], *shape)
    chunks = _offsets(cdiv(cu_q.diff(), GATE_CHUNK))
    call(
        "gate", q, means, cu_q, cu_k, cu_blocks, chunks, indices, scores, ELEMENTS[q.dtype], sequences, hq, hkv, hr,
        dim, spec.block_size, int(spec.causal), nslots.sink, nslots.local, nslots.picks, *q.stride()[:2], threads,
    )  # fmt: skip
    return indices, scores


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    indices: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    spec: Spec,
    nslots: Slots,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [Nq, Hq, D] in q's dtype, lse [Nq, Hq] float32, and the indices."""
    q, k, v, indices = _dense(q), _dense(k), _dense(v), indices.contiguous()
    (nq, hq, dim), hkv, threads = q.shape, k.shape[1], torch.get_num_threads()
    out, lse = torch.empty(q.shape), torch.empty(nq, hq)
    chunk = _chunk(q, hkv, indices, spec, threads)
    call(
        "attend", q, k, v, indices, cu_q, cu_k, _offsets(cdiv(cu_q.diff(), chunk)), out, lse, ELEMENTS[q.dtype],
        len(cu_q) - 1, hq, hkv, indices.shape[1], dim, indices.shape[2], nslots.own, spec.block_size, chunk,
        *(x.stride(i) for x in (q, k, v) for i in (0, 1)), spec.scale, threads,
    )  # fmt: skip
    add_sinks(out, lse, sinks)
    return out.to(q.dtype), lse, indices


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    sums: Tensor,
    rows: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    spec: Spec,
    nslots: Slots,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query over the chosen blocks of its cache row; arguments and results as the portable one's."""
    q = _dense(q)
    (width, hq, dim), (page, hkv) = q.shape, k_pages.shape[1:3]
    hr = hkv if spec.group else hq
    out, lse = torch.empty(q.shape), torch.empty(width, hq)
    indices = torch.empty(width, hr, nslots.total, dtype=torch.int32)
    parts = torch.empty(indices.numel() * hq // hr, dim + 2)
    call(
        "decode", q, k_pages, v_pages, table, sums, rows, lengths, starts, indices, out, lse, parts, ELEMENTS[q.dtype],
        width, hq, hkv, hr, dim, spec.block_size, sums.shape[1], nslots.sink, nslots.local, nslots.picks,
        table.shape[1], page, *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], spec.scale,
        torch.get_num_threads(),
    )  # fmt: skip
    add_sinks(out, lse, sinks)
    return out.to(q.dtype), lse, indices


def _chunk(q: Tensor, hkv: int, indices: Tensor, spec: Spec, threads: int) -> int:
    """Queries of one item: every thread gets several, and all fit the workspace. No result depends on it."""
    nq, hq, dim = q.shape
    group = hq // hkv
    row = 4 * (dim + LANES + 2) + 4 * indices.shape[1] * indices.shape[2] // hq  # bytes of its state and its choices
    fit = min(CHUNK_ROWS, spec.workspace_bytes // (threads * row)) // group
    return max(1, min(fit, max(512, cdiv(nq * hkv, 4 * threads))))


def _offsets(counts: Tensor) -> Tensor:
    """int32 [n + 1] exclusive prefix sums."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
