"""The merge of attention states over disjoint keys, a new key's joining a state, and their gradients in plain PyTorch.

On a CPU sums are made in blocks that stay in its caches, so that every shard is read once and the result written once.
"""

import bisect
import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 18  # elements of a block of the result, or of the entries that are summed into one


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(
    outs: Tensor,
    lses: Tensor,
    factors: Tensor | None,
    indptr: Tensor | None,
    base2: bool,
    out: Tensor,
    lse: Tensor,
    out_scale: Tensor | None,
) -> None:
    """Merge `outs [N, M, H, D]`, `lses [N, M, H]` into `out [M, H, D]`, `lse [M, H]`.

    With `indptr [R + 1]` int64 `M` is 1, and row `r` of `out [R, H, D]`, `lse [R, H]` merges entries
    `indptr[r]..indptr[r + 1]`. `factors [N]` multiply the lses, whose base is 2 or e. An lse of -inf or +inf means no
    keys. `out` may be a shard of `outs`, and `lse` one of `lses`. Results are divided by `out_scale [1]`, clamped.
    """
    if indptr is None:
        weights, total = _weights(_scaled(lses, factors), base2)
        _sum(outs, weights, out, out_scale)
    else:
        owners = _owners(indptr, len(outs))
        weights, total = _ragged_weights(_scaled(lses[:, 0], factors), owners, len(lse), base2)
        _sum_runs(outs[:, 0], weights, indptr, owners, out, out_scale)
    lse.copy_(total)


def merge_pair(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The state over the keys of both, `out [..., D]`, `lse [...]`; rows without keys must hold numbers, not NaN."""
    lse = torch.logaddexp(a[1], b[1])
    base = lse.masked_fill(lse == -math.inf, 0.0)
    return a[0] * (a[1] - base).exp_()[..., None] + b[0] * (b[1] - base).exp_()[..., None], lse


def merge_backward(
    dout: Tensor,
    dlse: Tensor | None,
    outs: Tensor,
    lses: Tensor,
    factors: Tensor | None,
    indptr: Tensor | None,
    base2: bool,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `merge` in the shapes and dtypes of `outs` and `lses`; exactly zero for shards of weight 0."""
    do, unit = dout.to(accumulator(outs.dtype)), math.log(2) if base2 else 1.0
    shift = (do * out.to(do.dtype)).sum(-1).mul_(-unit)
    shift = shift if dlse is None else shift + dlse
    douts, dlses = outs.new_empty(outs.shape), lses.new_empty(lses.shape)
    if indptr is None:
        weights, _ = _weights(_scaled(lses, factors), base2)
        parts = [(n, slice(None)) for n in range(len(outs))]
        shards = outs, douts, dlses
    else:
        owners = _owners(indptr, len(outs))
        weights, _ = _ragged_weights(_scaled(lses[:, 0], factors), owners, len(lse), base2)
        step = _step(outs[0]) if len(outs) else 1
        cuts = (slice(a, a + step) for a in range(0, len(outs), step))
        parts = [(cut, owners[cut]) for cut in cuts]
        shards = outs[:, 0], douts[:, 0], dlses[:, 0]
    for at, of in parts:
        w, g = weights[at], do[of]
        shards[1][at] = w[..., None] * g
        dot = (g * shards[0][at].to(g.dtype)).sum(-1).mul_(unit)
        shards[2][at] = torch.where(w == 0, 0.0, w * (dot + shift[of]))
    return douts, dlses if factors is None else dlses.mul_(factors[:, None, None])


def append(
    out_prev: Tensor,
    lse_prev: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    base2: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Each query's own key `k [M, Hkv, D]` and value join its state `out_prev [M, Hq, D]`, `lse_prev [M, Hq]`.

    `out` and `lse` may be `out_prev` and `lse_prev`.
    """
    (before, new), total = _shares(lse_prev, q, k, scale, base2)
    kept = out_prev.to(before.dtype).masked_fill(before[..., None] == 0, 0.0)
    joined = kept * before[..., None]
    grouped = joined.unflatten(1, (v.shape[1], -1))
    grouped.addcmul_(v[:, :, None].to(joined.dtype), new.unflatten(1, (v.shape[1], -1))[..., None])
    out.copy_(joined)
    lse.copy_(total)


def append_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out_prev: Tensor,
    lse_prev: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    base2: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `append` to its first five arguments, in their dtypes; exactly zero for a state of weight 0."""
    (before, new), _ = _shares(lse_prev, q, k, scale, base2)
    unit, kv_heads = math.log(2) if base2 else 1.0, k.shape[1]
    do = dout.to(before.dtype)
    shift = (do * out.to(do.dtype)).sum(-1).mul_(-unit)
    shift = shift if dlse is None else shift + dlse
    kept = out_prev.to(do.dtype).masked_fill(before[..., None] == 0, 0.0)
    d_lse = before * ((do * kept).sum(-1).mul_(unit) + shift)
    q, do, new, shift = (x.to(do.dtype).unflatten(1, (kv_heads, -1)) for x in (q, do, new, shift))
    k, v = (x.to(do.dtype)[:, :, None] for x in (k, v))
    # The score counts in units of the lse: 1 / unit of them.
    d_score = new * ((do * v).sum(-1) + shift / unit) * scale
    d_q, d_k, d_v = (d_score[..., None] * k).flatten(1, 2), d_score[..., None] * q, new[..., None] * do
    grads = before[..., None] * dout, torch.where(before == 0, 0.0, d_lse), d_q, d_k.sum(2), d_v.sum(2)
    return tuple(g.to(x.dtype) for g, x in zip(grads, (out_prev, lse_prev, q, k, v), strict=True))


def _shares(lse_prev: Tensor, q: Tensor, k: Tensor, scale: float, base2: bool) -> tuple[Tensor, Tensor]:
    """Weights `[2, M, Hq]` of the state and of the new key, and the joint lse `[M, Hq]`."""
    acc = accumulator(q.dtype)
    grouped = q.to(acc).unflatten(1, (k.shape[1], -1))
    score = (grouped * k.to(acc)[:, :, None]).sum(-1).flatten(1).mul_(scale / math.log(2) if base2 else scale)
    return _weights(torch.stack([_scaled(lse_prev, None), score]), base2)


def _scaled(lses: Tensor, factors: Tensor | None) -> Tensor:
    """+inf is -inf; both are no number that a factor could change."""
    empty = lses.isinf()
    lses = lses if factors is None else lses * factors.view(-1, *[1] * (lses.ndim - 1))
    return lses.masked_fill(empty, -math.inf)


def _weights(lses: Tensor, base2: bool) -> tuple[Tensor, Tensor]:
    """Normalised weights `[N, M, H]` and the lse of all `[M, H]`."""
    top = lses.amax(0)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = _exp(lses - top, base2)
    total = weights.sum(0)
    return weights.div_(total.masked_fill(total == 0, 1.0)), _log(total, base2).add_(top)


def _ragged_weights(lses: Tensor, owners: Tensor, rows: int, base2: bool) -> tuple[Tensor, Tensor]:
    """Weights `[nnz, H]`, normalised in each of the rows, and their lse `[rows, H]`."""
    top = lses.new_full((rows, lses.shape[1]), -math.inf)
    top.scatter_reduce_(0, owners[:, None].expand_as(lses), lses, "amax")
    top = top.masked_fill_(top == -math.inf, 0.0)
    weights = _exp(lses - top[owners], base2)
    total = torch.zeros_like(top).index_add_(0, owners, weights)
    return weights.div_(total.masked_fill(total == 0, 1.0)[owners]), _log(total, base2).add_(top)


def _exp(x: Tensor, base2: bool) -> Tensor:
    return x.exp2_() if base2 else x.exp_()


def _log(x: Tensor, base2: bool) -> Tensor:
    return x.log2() if base2 else x.log()


def _owners(indptr: Tensor, entries: int) -> Tensor:
    """The row of each entry."""
    return torch.repeat_interleave(indptr.diff(), output_size=entries)


def _step(row: Tensor) -> int:
    """How many rows like `row` make a block; all of them where a launch costs more than a trip through memory."""
    return max(1, BLOCK // max(1, row.numel())) if row.device.type == "cpu" else 1 << 62


def _sum(outs: Tensor, weights: Tensor, out: Tensor, out_scale: Tensor | None) -> None:
    for rows in _cuts(out):
        w, some = weights[:, rows], outs[:, rows]
        some = some if _all_count(w) else some.masked_fill(w[..., None] == 0, 0.0)
        acc = some[0] * w[0, ..., None]
        for o, x in zip(some[1:], w[1:], strict=True):
            acc.addcmul_(o, x[..., None])
        _store(out[rows], acc, out_scale)


def _cuts(x: Tensor) -> Iterator[slice]:
    step = min(_step(x[0]), len(x)) if len(x) else 1
    return (slice(a, a + step) for a in range(0, len(x), step))


def _sum_runs(
    outs: Tensor, weights: Tensor, indptr: Tensor, owners: Tensor, out: Tensor, out_scale: Tensor | None
) -> None:
    """Rows together that have a block of entries, and a row of many blocks by itself."""
    if not len(out):
        return
    step = _step(out[0])
    for rows, entries in _runs(indptr, len(out), len(outs), step):
        acc = torch.zeros(out[rows].shape, dtype=weights.dtype, device=out.device)
        for a in range(entries.start, entries.stop, step):
            part = slice(a, min(a + step, entries.stop))
            w, some = weights[part], outs[part]
            some = some if _all_count(w) else some.masked_fill(w[..., None] == 0, 0.0)
            acc.index_add_(0, owners[part] - rows.start, some * w[..., None])
        _store(out[rows], acc, out_scale)


def _runs(indptr: Tensor, rows: int, entries: int, step: int) -> Iterator[tuple[slice, slice]]:
    if step >= max(rows, entries):  # without asking the device
        yield slice(0, rows), slice(0, entries)
        return
    starts, a = indptr.tolist(), 0
    while a < rows:
        b = min(max(a + 1, bisect.bisect_right(starts, starts[a] + step) - 1), a + step, rows)
        yield slice(a, b), slice(starts[a], starts[b])
        a = b


def _all_count(weights: Tensor) -> bool:
    """False where some weight may be zero and what it weighs NaN. Only a CPU is asked: others would be waited for."""
    return weights.device.type == "cpu" and bool(weights.all())


def _store(out: Tensor, x: Tensor, scale: Tensor | None) -> None:
    if scale is not None:
        limit = torch.finfo(out.dtype).max
        x = x.div_(scale).clamp_(-limit, limit)
    out.copy_(x)
