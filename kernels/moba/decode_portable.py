"""MoBA decode in plain PyTorch: a gate on running block sums, then attention over the chosen blocks only.

Chosen keys are gathered row by row, a cache-sized chunk at a time. Pages have any strides but the last, which is 1.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import Slots, Spec, cdiv, slots

_INT32 = torch.iinfo(torch.int32).max
_BELOW = torch.iinfo(torch.int64).min  # ranks under every score, NaN and -inf included
_CPU_BYTES = 4 << 20
_GPU_BYTES = 256 << 20


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
    """Attention of each query over the selected blocks of its cache row.

    Args:
        q: `[R, Hq, D]`; query `r` is the last of keys `0..lengths[r]-1` of cache row `rows[r]`.
        k_pages, v_pages: `[pages, page, Hkv, D]`; key `t` of a row is token slot `starts[row] + t` of its pages.
        table: `[Bc, P]` int32, the pages of a row in order.
        sums: `[Bc, max_blocks, Hkv, D]`, the sum of each block's keys (float32, float64 with float64 keys).
        rows, lengths: `[R]` int32; `starts`: `[Bc]` int32 or None (zeros).
        sinks: `[Hq]` logits of the softmax's denominator, or None.

    Returns:
        `out [R, Hq, D]`, `lse [R, Hq]`, `indices [R, Hr, slots]` int32. No keys: out 0, lse -inf (or the sink), all -1.
    """
    width, hq, _ = q.shape
    hr = k_pages.shape[2] if spec.group else hq
    out, lse = q.new_empty(q.shape), q.new_empty((width, hq), dtype=torch.promote_types(q.dtype, torch.float32))
    indices = torch.full((width, hr, nslots.total), -1, dtype=torch.int32, device=q.device)
    if not width:
        return out, lse, indices
    live, blocks = reach(sums, lengths, spec, nslots)
    sums = sums[:, :blocks]
    k_rows, v_rows = (_Rows.of(x, table, starts) for x in (k_pages, v_pages))
    for part in _chunks(width, hq, live, sums, spec):
        row, length = rows[part].long(), lengths[part].long()
        chosen = select(q[part], sums, row, length, spec, live)
        place(indices[part], chosen, nslots, live)
        hkv = k_pages.shape[2]
        out[part], lse[part] = _attend(q[part], k_rows, v_rows, row, chosen, length, hkv, sinks, spec)
    return out, lse, indices


def select(q: Tensor, sums: Tensor, rows: Tensor, lengths: Tensor, spec: Spec, nslots: Slots) -> Tensor:
    """Blocks of each query, `[R, Hr, slots]` int64 in the order of `spec.py`; `rows`, `lengths` int64."""
    own = (lengths - 1).div(spec.block_size, rounding_mode="floor")[:, None]
    parts = [own]
    if nslots.sink:
        sink = torch.arange(nslots.sink, device=q.device)
        parts.append(torch.where(sink < own, sink, -1))
    if nslots.local:
        local = own - 1 - torch.arange(nslots.local, device=q.device)
        parts.append(local.masked_fill(local < spec.sink_blocks, -1))
    hr = sums.shape[2] if spec.group else q.shape[1]
    parts = [x[:, None].expand(-1, hr, -1) for x in parts]
    if nslots.picks:
        block = torch.arange(sums.shape[1], device=q.device)
        candidate = (block >= spec.sink_blocks) & (block < own - spec.local_blocks)
        parts.append(_best(_scores(q, sums, rows, spec.group), candidate[:, None], nslots.picks))
    return torch.cat(parts, -1)


def _scores(q: Tensor, sums: Tensor, rows: Tensor, group: bool) -> Tensor:
    """Query times block sum, `[R, Hr, n]`. Candidates are complete blocks, so sums rank as means do."""
    n, hkv = sums.shape[1:3]
    grouped = q.to(sums.dtype).unflatten(1, (hkv, -1))
    own = sums[int(rows)][None] if len(rows) == 1 and rows.device.type == "cpu" else sums.index_select(0, rows)
    scores = torch.matmul(grouped, own.permute(0, 2, 3, 1))
    return scores.sum(2) if group else scores.view(len(q), -1, n)


def _best(scores: Tensor, candidate: Tensor, count: int) -> Tensor:
    """The `count` best candidates, `[R, Hr, count]`, or -1: falling score, NaN first, ties to the lowest block."""
    scores = scores.masked_fill(scores.isnan(), math.nan) + 0.0  # one NaN, one zero
    small = scores.dtype == torch.float32
    bits = scores.view(torch.int32 if small else torch.int64)
    ranks = (bits ^ ((bits >> (31 if small else 63)) & torch.iinfo(bits.dtype).max)).long()
    if not small:
        ranks, order = ranks.masked_fill(~candidate, _BELOW).sort(dim=-1, descending=True, stable=True)
        return order.masked_fill(ranks == _BELOW, -1)[..., :count]
    low = 0x7FFFFFFF
    block = torch.arange(scores.shape[-1], device=scores.device)
    keys = ((ranks << 32) | (low - block)).masked_fill(~candidate, _BELOW).topk(count, dim=-1).values
    return (low - (keys & low)).masked_fill(keys == _BELOW, -1)


class _Rows(NamedTuple):
    """Pages of any strides as a table of rows of `D` elements, one for each key of each head; some may overlap."""

    table: Tensor  # [rows, D]
    pages: Tensor  # [Bc, P]
    starts: Tensor | None
    page: int  # tokens in a page
    strides: tuple[int, int, int]  # in rows: page, token, head

    @classmethod
    def of(cls, pages: Tensor, table: Tensor, starts: Tensor | None) -> "_Rows":
        strides = [s if n > 1 else 0 for s, n in zip(pages.stride(), pages.shape, strict=True)][:3]
        step = math.gcd(*strides) or pages.shape[3]
        by_page, by_token, by_head = (s // step for s in strides)
        count = 1 + sum(s // step * (n - 1) for s, n in zip(strides, pages.shape, strict=False))
        rows = pages.as_strided((count, pages.shape[3]), (step, 1))
        return cls(rows, table, starts, pages.shape[1], (by_page, by_token, by_head))

    def at(self, row: Tensor, heads: Tensor, positions: Tensor) -> Tensor:
        """Rows of the table, shaped as `positions [R, Hr, n]`, for cache rows `row [R]` and KV heads `heads [Hr]`."""
        slot = positions if self.starts is None else positions + self.starts[row][:, None, None].to(positions.dtype)
        pages, by_head = self.pages[row].to(positions.dtype), heads[:, None] * self.strides[2]
        if pages.shape[1] == 1:
            return slot * self.strides[1] + (pages[:, None] * self.strides[0] + by_head)
        page = pages.gather(1, (slot // self.page).flatten(1).long()).view_as(slot)
        return page * self.strides[0] + slot % self.page * self.strides[1] + by_head


def _attend(
    q: Tensor,
    k_rows: _Rows,
    v_rows: _Rows,
    row: Tensor,
    chosen: Tensor,
    lengths: Tensor,
    hkv: int,
    sinks: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """One softmax over the chosen blocks: all scores, then all values."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    (width, hq, dim), hr = q.shape, chosen.shape[1]
    dtype_at = torch.int32 if max(len(k_rows.table), len(v_rows.table)) <= _INT32 else torch.int64
    last = (lengths - 1).to(dtype_at)[:, None, None, None]
    first = (chosen * spec.block_size).to(dtype_at)[..., None]
    positions = first + torch.arange(spec.block_size, dtype=dtype_at, device=q.device)
    seen = (positions >= 0) & (positions <= last)
    # A hidden key repeats the query's own, so that unused memory is never read.
    positions = torch.where(seen, positions, last.clamp(min=0)).flatten(2)
    seen = seen.view(width * hr, 1, -1)
    heads = torch.arange(hr, dtype=dtype_at, device=q.device) // (hr // hkv)
    k_at = v_at = k_rows.at(row, heads, positions).flatten(0, 1)
    if k_rows.strides != v_rows.strides:
        v_at = v_rows.at(row, heads, positions).flatten(0, 1)
    q = (q.to(dtype) * spec.scale).reshape(width * hr, hq // hr, dim)
    scores = q.new_empty((*q.shape[:2], seen.shape[2]))
    parts = _split(len(q), seen.shape[2] * dim * dtype.itemsize, q.device)
    scratch = k_rows.table.new_empty(parts[0].stop * seen.shape[2], dim)  # fresh memory is slow
    for p in parts:
        torch.bmm(q[p], _take(k_rows, k_at[p], scratch).to(dtype).mT, out=scores[p])
    scores.masked_fill_(~seen, -math.inf)
    sink = None if sinks is None else sinks.to(dtype)[:, None].expand(width, -1, -1)
    weights, lse = _softmax(scores.view(width, hq, -1), sink)
    weights = weights.view(scores.shape)
    if hq == hr and q.device.type == "cpu" and v_rows.table.dtype == torch.float32 and v_rows.table.is_contiguous():
        out = F.embedding_bag(v_at, v_rows.table, per_sample_weights=weights[:, 0], mode="sum")[:, None]
    else:
        out = torch.empty_like(q)
        for p in parts:
            torch.bmm(weights[p], _take(v_rows, v_at[p], scratch).to(dtype), out=out[p])
    return out.reshape(width, hq, dim).masked_fill(lengths[:, None, None] <= 0, 0.0), lse


def _take(rows: _Rows, at: Tensor, scratch: Tensor) -> Tensor:
    return torch.index_select(rows.table, 0, at.flatten(), out=scratch[: at.numel()]).view(*at.shape, -1)


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights `[R, Hq, n]` and lse `[R, Hq]`; `sink [R, Hq, 1]` joins the denominator."""
    top = scores.amax(-1, keepdim=True)
    top = top if sink is None else torch.maximum(top, sink)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    total = total if sink is None else total + (sink - top).exp()
    return weights.div_(total.masked_fill(total == 0, 1.0)), (total.log() + top)[..., 0]


def reach(sums: Tensor, lengths: Tensor, spec: Spec, nslots: Slots) -> tuple[Slots, int]:
    """The slots and the blocks that rows of these `lengths` can use: a short row of a large cache stays cheap."""
    tokens = sums.shape[1] * spec.block_size
    if lengths.device.type == "cpu":  # free to read
        tokens = min(tokens, max(int(lengths.max()), 0))
    return Slots(*map(min, slots(spec, tokens), nslots)), cdiv(tokens, spec.block_size)


def place(indices: Tensor, chosen: Tensor, nslots: Slots, live: Slots) -> None:
    """Copy the live slots to where the full layout has them."""
    at = used = 0
    for full, kept in zip(nslots, live, strict=True):
        indices[..., at : at + kept] = chosen[..., used : used + kept]
        at, used = at + full, used + kept


def _chunks(width: int, hq: int, live: Slots, sums: Tensor, spec: Spec) -> list[slice]:
    """Queries a pass takes: what they hold besides gathered keys (sums, scores, places) stays bounded."""
    gate = (sums[0].numel() + 4 * hq * sums.shape[1]) * sums.dtype.itemsize
    return _split(width, gate + 40 * hq * live.total * spec.block_size, sums.device)


def _split(count: int, size: int, device: torch.device) -> list[slice]:
    step = max((_CPU_BYTES if device.type == "cpu" else _GPU_BYTES) // max(size, 1), 1)
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]
