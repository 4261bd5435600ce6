"""Dense attention and the merge of attention states in plain PyTorch: any device, any float dtype, float64 included.

Tensors are packs: `q [Nq, Hq, D]`, `k, v [Nk, Hkv, D]`, int32 `cu_q, cu_k [S+1]`. Work is done on tiles
`[b, h, n, d]`, views of a pack. On the CPU a tile runs through PyTorch's flash kernel, which knows only top-left causal
masks, so every other shape is cut in pieces that are rectangles or squares, and the pieces' states are merged.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .portable_merge import accumulator, append, append_backward, merge, merge_backward, merge_pair

__all__ = ["accumulator", "append", "append_backward", "attention", "attention_backward", "merge", "merge_backward"]

SPLIT_SQUARES = range(257, 513)  # sizes at which PyTorch's CPU kernel is slower on a causal square than on its halves
WINDOW_CHUNK = 512  # queries of a sliding window handled together
SCORE_ELEMENTS = 1 << 24  # most scores that the explicit path holds at a time


class Piece(NamedTuple):
    """Keys [start, stop) of a tile; `causal` aligns the first query with the first key; `mask [n, m]` is additive."""

    start: int
    stop: int
    causal: bool
    mask: Tensor | None = None


def uses_cpu_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu"


def flash(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """State of `q [b, h, n, d]` over `k, v [b, h, m, d]`, heads expanded. lse [b, h, n] float32 (float64)."""
    if uses_cpu_kernel(q):
        q, k, v, scale = _for_cpu_kernel(q, k, v, scale)
        mask = None if mask is None else mask[None, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    acc = accumulator(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=acc, device=q.device)
    for rows in _row_chunks(q, k):
        s = _scores(q, k, rows, causal, scale, mask)
        lse[:, :, rows] = torch.logsumexp(s, -1)
        p = (s - lse[:, :, rows, None]).exp_()
        out[:, :, rows] = (p @ v.to(acc)).to(q.dtype)
    return out, lse


def flash_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one tile. `out` and `lse` may be those of more keys than the tile has."""
    if uses_cpu_kernel(q):
        return _flash_backward_cpu(dout, dlse, q, k, v, out, lse, causal, scale, mask)
    acc = accumulator(q.dtype)
    shift = (dout.to(acc) * out.to(acc)).sum(-1)
    shift = shift if dlse is None else shift - dlse
    dq = torch.empty(q.shape, dtype=acc, device=q.device)
    dk, dv = torch.zeros(k.shape, dtype=acc, device=k.device), torch.zeros(v.shape, dtype=acc, device=v.device)
    for rows in _row_chunks(q, k):
        p = (_scores(q, k, rows, causal, scale, mask) - lse[:, :, rows, None]).exp_()
        do = dout[:, :, rows].to(acc)
        dv += p.mT @ do
        ds = p.mul_(do @ v.to(acc).mT - shift[:, :, rows, None]).mul_(scale)
        dq[:, :, rows] = ds @ k.to(acc)
        dk += ds.mT @ q[:, :, rows].to(acc)
    return dq, dk, dv


def _for_cpu_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """It takes the last dimension to be dense, and scales the scores after it has masked them with -inf."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return (q, k, v, scale) if scale >= 0 else (-q, k, v, -scale)


def _flash_backward_cpu(dout, dlse, q, k, v, out, lse, causal, scale, mask):
    d, negative = q.shape[-1], scale < 0
    q, k, v, scale = _for_cpu_kernel(q, k, v, scale)
    if dlse is not None:
        # The kernel derives delta = sum(dout * out) itself; a further column turns it into delta - dlse.
        q, k, v = (F.pad(x, (0, 1)) for x in (q, k, v))
        dout = F.pad(dout, (0, 1), value=1.0)
        out = torch.cat([out, -dlse[..., None].to(out.dtype)], -1)
    mask = None if mask is None else mask[None, None]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    dq, dk, dv = (g[..., :d] for g in grads)
    return -dq if negative else dq, dk, dv


def _row_chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    n = q.shape[2]
    step = max(1, SCORE_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _scores(q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float, mask: Tensor | None) -> Tensor:
    acc = accumulator(q.dtype)
    s = (q[:, :, rows].to(acc) * scale) @ k.to(acc).mT
    if causal:
        i = torch.arange(rows.start, rows.stop, device=q.device)
        j = torch.arange(k.shape[2], device=q.device)
        s = s.masked_fill_(j > i[:, None], -math.inf)
    return s if mask is None else s.add_(mask[rows])


def pieces(nq: int, nk: int, causal: bool) -> list[Piece]:
    """How queries that sit at the end of their keys see them."""
    if nk == 0:
        return []
    if not causal:
        return [Piece(0, nk, False)]
    square = Piece(nk - nq, nk, True)
    return [square] if nq == nk else [Piece(0, nk - nq, False), square]


def _window_pieces(first: int, n: int, window: int, like: Tensor) -> list[Piece]:
    """Queries at positions first..first+n-1, each seeing the `window` keys that end at its own."""
    lo, end = max(0, first - window + 1), first + n
    i = torch.arange(first, end, device=like.device)[:, None]
    edge = max(lo, end - window + 1) if window > n else end
    found = []
    if edge > lo:
        j = torch.arange(lo, edge, device=like.device)
        seen = (j <= i) & (j > i - window)
        mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)
        found.append(Piece(lo, edge, False, mask))
    if edge < first:
        found.append(Piece(edge, first, False))
    if edge < end:
        found.append(Piece(first, end, True))
    return found


def _heads(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Query and key heads that share a kernel call; with GQA a KV head at a time, so that it is never copied."""
    hq, hkv = q.shape[1], k.shape[1]
    if hq == hkv:
        return [(slice(None), slice(None))]
    group = hq // hkv
    return [(slice(g * group, (g + 1) * group), slice(g, g + 1)) for g in range(hkv)]


def tile_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, parts: list[Piece], scale: float) -> None:
    """Write the state of tile `q` over the pieces of `k, v [b, hkv, m, d]` into the views `out` and `lse`."""
    n = q.shape[2]
    if n in SPLIT_SQUARES and parts == [Piece(0, n, True)]:
        for rows, cut in ((slice(n // 2), [Piece(0, n // 2, True)]), (slice(n // 2, n), pieces(n - n // 2, n, True))):
            tile_forward(q[:, :, rows], k, v, out[:, :, rows], lse[:, :, rows], cut, scale)
        return
    for hq, hkv in _heads(q, k):
        b, h, n, d = q[:, hq].shape
        state = None
        for part in parts:
            kp, vp = (x[:, hkv, part.start : part.stop].expand(b, h, -1, d) for x in (k, v))
            found = flash(q[:, hq], kp, vp, part.causal, scale, part.mask)
            state = found if state is None else merge_pair(state, found)
        out[:, hq], lse[:, hq] = state if state else (0.0, -math.inf)


def tile_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    parts: list[Piece],
    scale: float,
) -> None:
    """Add one tile's gradients into the views `grads`."""
    dq, dk, dv = grads
    for hq, hkv in _heads(q, k):
        b, h, n, d = q[:, hq].shape
        dl = None if dlse is None else dlse[:, hq]
        for part in parts:
            keys = slice(part.start, part.stop)
            kp, vp = (x[:, hkv, keys].expand(b, h, -1, d) for x in (k, v))
            gq, gk, gv = flash_backward(
                dout[:, hq], dl, q[:, hq], kp, vp, out[:, hq], lse[:, hq], part.causal, scale, part.mask
            )
            dq[:, hq] += gq
            for grad, g in ((dk, gk), (dv, gv)):
                grad[:, hkv, keys] += g if h == grad[:, hkv].shape[1] else g.sum(1, keepdim=True, dtype=grad.dtype)


def tile(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """View of rows start..start+count*length-1 of a pack [N, H, ...] as [count, H, length, ...]."""
    return x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)


def _tiles(cu_q: Tensor, cu_k: Tensor, q: Tensor, causal: bool, window: int | None):
    """(count, query start, query length, key start, key length, pieces) of every tile of a pack."""
    bq, bk = cu_q.tolist(), cu_k.tolist()
    spans = [(bq[i], bq[i + 1] - bq[i], bk[i], bk[i + 1] - bk[i]) for i in range(len(bq) - 1)]
    if len({(nq, nk) for _, nq, _, nk in spans}) == 1 and window is None:
        q0, nq, k0, nk = spans[0]
        spans = [(q0, nq, k0, nk)]
        yield len(bq) - 1, q0, nq, k0, nk, pieces(nq, nk, causal)
        return
    for q0, nq, k0, nk in spans:
        if window is None or not causal:
            yield 1, q0, nq, k0, nk, pieces(nq, nk, causal)
            continue
        step = min(max(window - 1, 64), WINDOW_CHUNK)
        for i in range(0, nq, step):
            n = min(step, nq - i)
            yield 1, q0 + i, n, k0, nk, _window_pieces(nk - nq + i, n, window, q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Dense attention of a pack. Returns out [Nq, Hq, D] in q's dtype and lse [Nq, Hq] float32 (float64)."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=accumulator(q.dtype), device=q.device)
    for count, q0, nq, k0, nk, parts in _tiles(cu_q, cu_k, q, causal, window):
        if nq:
            qt, ot, lt = (tile(x, q0, count, nq) for x in (q, out, lse))
            tile_forward(qt, tile(k, k0, count, nk), tile(v, k0, count, nk), ot, lt, parts, scale)
    add_sinks(out, lse, sinks)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attention`: dq, dk, dv in their tensors' dtypes, dsinks float32 (float64), None without sinks."""
    acc = accumulator(q.dtype)
    grads = tuple(torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k, v))
    for count, q0, nq, k0, nk, parts in _tiles(cu_q, cu_k, q, causal, window):
        if nq:
            dot, qt, ot, lt, dqt = (tile(x, q0, count, nq) for x in (dout, q, out, lse, grads[0]))
            kt, vt, dkt, dvt = (tile(x, k0, count, nk) for x in (k, v, grads[1], grads[2]))
            dlt = None if dlse is None else tile(dlse, q0, count, nq)
            tile_backward(dot, dlt, qt, kt, vt, ot, lt, (dqt, dkt, dvt), parts, scale)
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, sinks_backward(dout, dlse, out, lse, sinks)


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> None:
    """Count a logit per head in the denominator, in place."""
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
        # Where both are -inf the row stays empty.
        weight = (lse - total.masked_fill(total == -math.inf, 0.0)).exp_()
        out.mul_(weight[..., None])
        lse.copy_(total)


def sinks_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    if sinks is None:
        return None
    shift = -(dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    shift = shift if dlse is None else shift + dlse
    weight = (sinks.to(lse.dtype) - lse.masked_fill(lse == -math.inf, math.inf)).exp_()
    return (weight * shift).sum(0)
