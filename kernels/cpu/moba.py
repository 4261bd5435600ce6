"""MoBA from C kernels for CPUs: gate, attention and decode, with the signatures of the portable backend's.

Gradients are the portable backend's.
"""

import torch
from torch import Tensor

from ..moba.decode_portable import place, reach
from ..moba.portable import backward
from ..moba.spec import Slots, Spec, cdiv
from ..states.portable import add_sinks
from .module import ELEMENTS, call, dense

__all__ = ["backward", "decode", "forward", "select"]

GATE_QUERIES = 1024  # of one item of the gate at most
GATE_BYTES = 16 << 20  # of the queries and choices of one item of the gate
PART_BYTES = 64 << 20  # of the partial softmaxes of the queries that decode together
LANES = 16  # the widest vectors: rows of a state are a multiple of them
CHUNK_ROWS = 16384  # rows (queries times heads of a group) of one item of the attention: their state fits the caches


def select(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, spec: Spec, nslots: Slots, want_scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Blocks of every query, int32 [Nq, Hr, slots], and, if wanted, their float32 scores."""
    q, k, cu_q, cu_k = dense(q), dense(k), cu_q.contiguous(), cu_k.contiguous()
    (nq, hq, dim), hkv = q.shape, k.shape[1]
    hr, sequences, threads = hkv if spec.group else hq, len(cu_q) - 1, torch.get_num_threads()
    indices = torch.empty(nq, hr, nslots.total, dtype=torch.int32)
    scores = torch.empty(indices.shape, dtype=torch.float32) if want_scores else None
    cu_blocks = _offsets(cdiv(cu_k.diff(), spec.block_size))
    means = torch.empty(int(cu_blocks[-1]), hkv, dim, dtype=torch.float32)
    if nslots.picks:
        shape = (sequences, hkv, dim, spec.block_size, *k.stride()[:2], threads)
        call("centroids", k, cu_k, cu_blocks, means, ELEMENTS[k.dtype], *shape)
    chunk = max(1, min(GATE_QUERIES, GATE_BYTES // (4 * dim + 8 * nslots.picks)))
    call(
        "gate", q, means, cu_q, cu_k, cu_blocks, _offsets(cdiv(cu_q.diff(), chunk)), indices, scores, ELEMENTS[q.dtype],
        sequences, hq, hkv, hr, dim, spec.block_size, int(spec.causal), nslots.sink, nslots.local, nslots.picks, chunk,
        *q.stride()[:2], threads,
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
    q, k, v, indices, cu_q, cu_k = dense(q), dense(k), dense(v), *(x.contiguous() for x in (indices, cu_q, cu_k))
    (nq, hq, dim), hkv, threads = q.shape, k.shape[1], torch.get_num_threads()
    out, lse = torch.empty(q.shape, dtype=torch.float32), torch.empty(nq, hq, dtype=torch.float32)
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
    (width, hq, dim), (page, hkv) = q.shape, k_pages.shape[1:3]
    hr, threads = hkv if spec.group else hq, torch.get_num_threads()
    out, lse = torch.empty(q.shape, dtype=torch.float32), torch.empty(width, hq, dtype=torch.float32)
    indices = torch.full((width, hr, nslots.total), -1, dtype=torch.int32)
    if not width:
        return out.to(q.dtype), lse, indices
    live, _ = reach(sums, lengths, spec, nslots)
    step = max(1, PART_BYTES // (4 * hq * live.total * (dim + 2)))
    for part in (slice(i, min(i + step, width)) for i in range(0, width, step)):
        some, count = dense(q[part]), part.stop - part.start
        chosen = torch.empty(count, hr, live.total, dtype=torch.int32)
        parts = torch.empty(count * hq * live.total, dim + 2, dtype=torch.float32)
        call(
            "decode", some, k_pages, v_pages, table, sums, rows[part], lengths[part], starts, chosen, out[part],
            lse[part], parts, ELEMENTS[q.dtype], count, hq, hkv, hr, dim, spec.block_size, sums.shape[1], live.sink,
            live.local, live.picks, table.shape[1], page, *some.stride()[:2], *k_pages.stride()[:3],
            *v_pages.stride()[:3], spec.scale, threads,
        )  # fmt: skip
        place(indices[part], chosen, nslots, live)
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
