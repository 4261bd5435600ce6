"""MoBA decode in plain PyTorch: a gate on running block sums, then attention over the chosen blocks only.

Keys and values are read in whole blocks (or in the longest runs the pages allow) and a cache-sized chunk at a time.
Pages have any strides but the last, which is 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Slots, Spec, cdiv, slots

_BELOW = torch.iinfo(torch.int64).min  # ranks under every score, NaN and -inf included
_CPU_BYTES = 8 << 20
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
    reach = sums.shape[1] * spec.block_size
    if lengths.device.type == "cpu":  # free to read, and a short row of a large cache stays cheap
        reach = min(reach, max(int(lengths.max()), 0))
    live = Slots(*map(min, slots(spec, reach), nslots))
    sums = sums[:, : cdiv(reach, spec.block_size)]
    k_rows, v_rows = (_Rows.of(x, table, starts, spec.block_size) for x in (k_pages, v_pages))
    for part in _chunks(width, hq, live, sums, spec):
        row, length = rows[part].long(), lengths[part].long()
        chosen = select(q[part], sums, row, length, spec, live)
        _place(indices[part], chosen, nslots, live)
        places = _Places.of(chosen, length, spec.block_size)
        out[part], lse[part] = _attend(q[part], k_rows, v_rows, row, places, sinks, spec.scale)
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


class _Places(NamedTuple):
    """Where the keys of `R` queries are: the own block, key by key, and the first keys of the other blocks."""

    own: Tensor  # [R, B] positions; a hidden one repeats the query's own, so that unused memory is never read
    own_visible: Tensor  # [R, B]
    blocks: Tensor  # [R, Hr, S] first positions of complete blocks
    visible: Tensor  # [R, Hr, S]

    @classmethod
    def of(cls, chosen: Tensor, lengths: Tensor, block_size: int) -> "_Places":
        last = (lengths - 1)[:, None]
        own = last - last % block_size + torch.arange(block_size, device=chosen.device)
        own_visible = (own <= last) & (last >= 0)
        own = torch.where(own_visible, own, last.clamp(min=0))
        blocks = chosen[..., 1:]
        return cls(own, own_visible, blocks.clamp(min=0) * block_size, blocks >= 0)


class _Rows(NamedTuple):
    """Pages of any strides as overlapping windows over their storage, so that a gather copies whole windows."""

    pages: Tensor  # [pages, page, Hkv, D]
    table: Tensor  # [Bc, P]
    starts: Tensor | None
    run: int  # tokens of a block that always lie in one page
    per_block: int  # runs in a block
    step: int  # elements between two windows
    strides: tuple[int, int, int]  # in steps: page, token, head
    count: int  # steps from the first token and head to the last

    @classmethod
    def of(cls, pages: Tensor, table: Tensor, starts: Tensor | None, block_size: int) -> "_Rows":
        run = block_size if table.shape[1] == 1 else math.gcd(pages.shape[1], block_size) if starts is None else 1
        strides = [s if n > 1 else 0 for s, n in zip(pages.stride(), pages.shape, strict=True)][:3]
        step = math.gcd(*strides) or pages.shape[3]
        by_page, by_token, by_head = (s // step for s in strides)
        count = 1 + sum(s // step * (n - 1) for s, n in zip(strides, pages.shape, strict=False))
        return cls(pages, table, starts, run, block_size // run, step, (by_page, by_token, by_head), count)

    def tokens(self, row: Tensor, positions: Tensor) -> Tensor:
        """`[R, n, Hkv, D]` at `positions [R, n]`."""
        return self._take(self._at(row, positions), self.pages.shape[2], self.strides[2])

    def blocks(self, row: Tensor, firsts: Tensor, heads: Tensor, scratch: Tensor) -> Tensor:
        """`[P, S * B, D]` of the blocks that begin at `firsts [P, S]`, each of the `P` pairs with its row and head."""
        runs = firsts[..., None] + torch.arange(0, self.run * self.per_block, self.run, device=firsts.device)
        at = self._at(row, runs.flatten(1)) + heads[:, None] * self.strides[2]
        return self._take(at, self.run, self.strides[1], scratch).flatten(1, 2)

    def _at(self, row: Tensor, positions: Tensor) -> Tensor:
        slot = positions if self.starts is None else positions + self.starts[row].long()[:, None]
        pages = self.table[row].long()
        if pages.shape[1] == 1:
            return pages * self.strides[0] + slot * self.strides[1]
        page = self.pages.shape[1]
        return pages.gather(1, slot // page) * self.strides[0] + slot % page * self.strides[1]

    def _take(self, at: Tensor, size: int, stride: int, scratch: Tensor | None = None) -> Tensor:
        """Windows `[*at, size, D]`. Only hidden blocks can reach past the end, and they may read anything real."""
        count, dim = self.count - (size - 1) * stride, self.pages.shape[3]
        windows = self.pages.as_strided((count, size, dim), (self.step, stride * self.step, 1))
        out = None if scratch is None else scratch[: at.numel() * size * dim].view(-1, size, dim)
        return torch.index_select(windows, 0, at.flatten().clamp(max=count - 1), out=out).view(*at.shape, size, dim)


def _attend(
    q: Tensor, k_rows: _Rows, v_rows: _Rows, row: Tensor, places: _Places, sinks: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One softmax over the own block and the chosen ones: all scores, then all values."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    width, hq, dim = q.shape
    hkv, hr, picks = k_rows.pages.shape[2], *places.visible.shape[1:]
    q = q.to(dtype) * scale
    k_own, v_own = (x.tokens(row, places.own).to(dtype).transpose(1, 2) for x in (k_rows, v_rows))
    own = torch.matmul(q.unflatten(1, (hkv, -1)), k_own.transpose(2, 3))
    own = own.masked_fill(~places.own_visible[:, None, None], -math.inf).flatten(1, 2)

    firsts, pair_row = places.blocks.flatten(0, 1), row.repeat_interleave(hr)
    heads = (torch.arange(hr, device=q.device) // (hr // hkv)).repeat(width)
    visible = places.visible.flatten(0, 1)[..., None].expand(-1, -1, k_rows.run * k_rows.per_block).flatten(1)
    pair_q = q.unflatten(1, (hr, -1)).flatten(0, 1)
    parts = _split(len(firsts), visible.shape[1] * dim * dtype.itemsize, q.device) if picks else []
    scores = q.new_empty((*pair_q.shape[:2], visible.shape[1]))
    scratch = k_rows.pages.new_empty(parts[0].stop * visible.shape[1] * dim if parts else 0)  # fresh memory is slow
    for p in parts:
        keys = k_rows.blocks(pair_row[p], firsts[p], heads[p], scratch).to(dtype)
        torch.bmm(pair_q[p], keys.transpose(1, 2), out=scores[p])
    scores.masked_fill_(~visible[:, None], -math.inf)

    every = torch.cat([own, scores.view(width, hq, -1)], -1)
    sink = None if sinks is None else sinks.to(dtype)[:, None].expand(width, -1, -1)
    weights, lse = _softmax(every, sink)
    own, scores = weights.split([own.shape[-1], scores.shape[-1]], -1)
    out = torch.matmul(own.unflatten(1, (hkv, -1)), v_own).flatten(1, 2)
    out = out.masked_fill((~places.own_visible).all(1)[:, None, None], 0.0)
    scores, more = scores.unflatten(1, (hr, -1)).flatten(0, 1), q.new_empty((*pair_q.shape[:2], dim))
    hidden = (~visible)[..., None] if q.device.type != "cpu" or not visible.all() else None
    for p in parts:
        values = v_rows.blocks(pair_row[p], firsts[p], heads[p], scratch).to(dtype)
        if hidden is not None:
            values = values.masked_fill(hidden[p], 0.0)
        torch.bmm(scores[p], values, out=more[p])
    return out + more.view_as(out) if picks else out, lse


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights `[R, Hq, n]` and lse `[R, Hq]`; `sink [R, Hq, 1]` joins the denominator."""
    top = scores.amax(-1, keepdim=True)
    top = top if sink is None else torch.maximum(top, sink)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    total = total if sink is None else total + (sink - top).exp()
    return weights.div_(total.masked_fill(total == 0, 1.0)), (total.log() + top)[..., 0]


def _place(indices: Tensor, chosen: Tensor, nslots: Slots, live: Slots) -> None:
    """Copy the live slots to where the full layout has them."""
    at = used = 0
    for full, kept in zip(nslots, live, strict=True):
        indices[..., at : at + kept] = chosen[..., used : used + kept]
        at, used = at + full, used + kept


def _chunks(width: int, hq: int, live: Slots, sums: Tensor, spec: Spec) -> list[slice]:
    """Queries a pass takes: what they hold besides gathered blocks (sums, scores, the own block) stays bounded."""
    hkv, dim = sums.shape[2:]
    gate = sums[0].numel() + 4 * hq * sums.shape[1]
    attention = 2 * spec.block_size * hkv * dim + 4 * hq * live.total * spec.block_size
    return _split(width, (gate + attention) * sums.dtype.itemsize, sums.device)


def _split(count: int, size: int, device: torch.device) -> list[slice]:
    step = max((_CPU_BYTES if device.type == "cpu" else _GPU_BYTES) // max(size, 1), 1)
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]
