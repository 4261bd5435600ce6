"""MoBA in plain PyTorch: any device, any float dtype, float64 included; fast on the CPU.

KV heads are walked one at a time on contiguous copies of their rows. Own blocks are tiles of dense causal attention;
the other chosen blocks go through `portable_gather.py`. Where blocks are tiny or queries few, everything goes through
`portable_rows.py` instead. Tensors are packs, see `spec.py`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..states.portable import accumulator, add_sinks, pieces, sinks_backward, tile, tile_backward, tile_forward
from ..threads import each, workers
from . import portable_gather as gather
from . import portable_rows as by_rows
from .portable_gate import Sequence, route, sequences
from .spec import Slots, Spec

LEAST_BYTES = 32 << 20  # partial results get at least this much room, unless the caller's workspace is smaller
CALL_ELEMENTS = 8192  # a kernel call costs as much as gathering this many elements of a key and its value
OWN_TILE_ROWS = 8192  # queries whose own blocks are handled in one call


def select(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, spec: Spec, nslots: Slots, want_scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Blocks of every query, int32 [Nq, Hr, slots], and, if wanted, their float32 scores."""
    return route(q, k, sequences(cu_q, cu_k, spec.block_size), spec, nslots, want_scores)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    indices: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    spec: Spec,
    nslots: Slots,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [Nq, Hq, D] in q's dtype, lse [Nq, Hq] float32 (float64), and the indices that were used."""
    seqs = sequences(cu_q, cu_k, spec.block_size)
    if indices is None:
        indices, _ = route(q, k, seqs, spec, nslots, False)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=accumulator(q.dtype), device=q.device)
    if _prefer_rows(q, k, indices, seqs, spec):
        by_rows.forward(q, k, v, indices, seqs, spec, out, lse)
        add_sinks(out, lse, sinks)
        return out, lse, indices
    heads_of, count = _kv_heads(q, k)

    def one(item: tuple[slice, slice]) -> None:
        heads, head = item
        workspace = gather.Workspace(indices, nslots, q, k, _room(q, spec) // count)
        qh, kh, vh = q[:, heads], _rows(k, head), _rows(v, head)
        o = torch.zeros(qh.shape, dtype=q.dtype, device=q.device)
        x = torch.full(qh.shape[:2], -math.inf, dtype=lse.dtype, device=q.device)
        for qt, kt, parts in _own_tiles(seqs, spec):
            tile_forward(tile(qh, *qt), tile(kh, *kt), tile(vh, *kt), tile(o, *qt), tile(x, *qt), parts, spec.scale)
        add_sinks(o, x, None if sinks is None else sinks[heads])
        for pairs in workspace.segments(indices, head.start, seqs, spec):
            gather.forward(pairs, workspace, qh, kh, vh, o, x, spec.scale)
        out[:, heads], lse[:, heads] = o, x

    each(one, heads_of, count)
    return out, lse, indices


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    spec: Spec,
    nslots: Slots,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv in their tensors' dtypes and dsinks float32 (float64); none flows through the choice of blocks."""
    dout = dout.contiguous()
    seqs = sequences(cu_q, cu_k, spec.block_size)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dsinks = sinks_backward(dout, dlse, out, lse, sinks)
    if _prefer_rows(q, k, indices, seqs, spec):
        by_rows.backward(dout, dlse, q, k, v, out, lse, indices, seqs, spec, (dq, dk, dv))
        return dq, dk, dv, dsinks
    heads_of, count = _kv_heads(q, k)

    def one(item: tuple[slice, slice]) -> None:
        heads, head = item
        workspace = gather.Workspace(indices, nslots, q, k, _room(q, spec) // count)
        qh, kh, vh = _rows(q, heads), _rows(k, head), _rows(v, head)
        do, o, x = _rows(dout, heads), _rows(out, heads), _rows(lse, heads)
        dx = None if dlse is None else _rows(dlse, heads)
        grads = tuple(torch.zeros(t.shape, dtype=lse.dtype, device=q.device) for t in (qh, kh, vh))
        for qt, kt, parts in _own_tiles(seqs, spec):
            rows = [None if t is None else tile(t, *qt) for t in (do, dx, qh, o, x, grads[0])]
            keys = [tile(t, *kt) for t in (kh, vh, grads[1], grads[2])]
            tile_backward(*rows[:3], *keys[:2], *rows[3:5], (rows[5], *keys[2:]), parts, spec.scale)
        for pairs in workspace.segments(indices, head.start, seqs, spec):
            gather.backward(pairs, workspace, do, dx, qh, kh, vh, o, x, grads, spec.scale)
        dq[:, heads], dk[:, head], dv[:, head] = grads

    each(one, heads_of, count)
    return dq, dk, dv, dsinks


def _kv_heads(q: Tensor, k: Tensor) -> tuple[list[tuple[slice, slice]], int]:
    """The query heads of each KV head and that head, and how many to handle at a time."""
    group = q.shape[1] // k.shape[1]
    heads = [(slice(g * group, (g + 1) * group), slice(g, g + 1)) for g in range(k.shape[1])]
    return heads, workers(len(heads), q)


def _rows(x: Tensor, heads: slice) -> Tensor:
    return x[:, heads].contiguous()


def _room(q: Tensor, spec: Spec) -> int:
    """Bytes for partial results: at eight heads and eight blocks one KV head's, so that lists of queries stay long."""
    return min(spec.workspace_bytes, max(LEAST_BYTES, q.numel() * q.element_size() * 5 // 4))


def _prefer_rows(q: Tensor, k: Tensor, indices: Tensor, seqs: list[Sequence], spec: Spec) -> bool:
    """Whether gathering keys for each query is cheaper than a kernel call for each list of queries."""
    pairs = indices.numel()
    lists = min(pairs, k.shape[1] * sum(-(-s.nk // spec.block_size) for s in seqs))
    return pairs * spec.block_size * q.shape[2] < lists * CALL_ELEMENTS


def _own_tiles(seqs: list[Sequence], spec: Spec) -> Iterator[tuple[tuple, tuple, list]]:
    """(start, count, length) of the queries and of the keys, and how they see each other, of tiles of own blocks."""
    block = spec.block_size
    most = max(1, OWN_TILE_ROWS // block)
    for seq in seqs if spec.causal else ():
        done = 0
        while done < seq.nq:
            first = seq.nk - seq.nq + done
            offset, rest = first % block, seq.nq - done
            whole = not offset and rest >= block
            count, nq = (min(rest // block, most), block) if whole else (1, min(block - offset, rest))
            nk = offset + nq
            yield (seq.q0 + done, count, nq), (seq.k0 + first - offset, count, nk), pieces(nq, nk, True)
            done += count * nq
