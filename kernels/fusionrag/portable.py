"""Selective attention in plain PyTorch: any device, any float dtype, float64 included; fast on the CPU.

A request's rows are sorted by position and cut in chunks. All rows of a chunk see every key before its first position:
a dense tile, no mask. The rest is halved again and again, the later half seeing every key between both halves' first
positions, until it is so small that a mask costs less than further calls. The query heads of a KV head are rows of one
tile, so no head is copied.
"""

import bisect
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..states.portable import accumulator, flash, flash_backward, merge_pair
from .portable_keys import turn
from .spec import Keys, sort_rows

CHUNK_ROWS = 1024  # rows (positions times heads of a group) that share a dense tile
SPLIT_WORK = 1 << 24  # products of a masked tile from which on two calls more cost less than what they save


class Block(NamedTuple):
    """Sorted rows [a, b) of a request and the keys [start, stop) they see; `masked`: each up to its own position."""

    a: int
    b: int
    start: int
    stop: int
    masked: bool


class Request(NamedTuple):
    """One request's rows that have keys, and its keys up to the last that any of them sees."""

    rows: Tensor  # int64 [n], by rising position
    at: list[int]  # their positions
    keys: slice  # where they lie in k and v (without a table) and in cos and sin
    k: Tensor  # [1, Hkv, t, D], turned
    v: Tensor


class Tile(NamedTuple):
    """A block in a request's tensors `[1, h, n * group, ...]` and `[1, h, t, D]`."""

    rows: slice
    keys: slice
    mask: Tensor | None  # additive [rows, keys]


def forward(q: Tensor, keys: Keys, positions: Tensor, cu_q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [Nq, Hq, D] in q's dtype and lse [Nq, Hq] float32 (float64); 0 and -inf in rows at position -1."""
    acc, hkv = accumulator(q.dtype), keys.k.shape[-2]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=acc, device=q.device)
    for r in _requests(keys, positions, cu_q):
        rows = _gather(q, r.rows, hkv)
        o = torch.zeros(rows.shape, dtype=acc, device=q.device)
        x = torch.full(rows.shape[:3], -math.inf, dtype=acc, device=q.device)
        for t in _tiles(r, rows):
            found = flash(rows[:, :, t.rows], r.k[:, :, t.keys], r.v[:, :, t.keys], False, scale, t.mask)
            at = slice(None), slice(None), t.rows
            o[at], x[at] = merge_pair((o[at], x[at]), found)
        _scatter(out, r.rows, o, hkv)
        _scatter(lse, r.rows, x, hkv)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: Keys,
    out: Tensor,
    lse: Tensor,
    positions: Tensor,
    cu_q: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in their tensors' dtypes, of keys without a table; those of turned keys are turned back."""
    acc, hkv = accumulator(q.dtype), keys.k.shape[-2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, keys.k, keys.v))
    for r in _requests(keys, positions, cu_q):
        do, rows, o, x = (_gather(t, r.rows, hkv) for t in (dout, q, out, lse))
        dx = None if dlse is None else _gather(dlse, r.rows, hkv)
        gq, gk, gv = (torch.zeros(t.shape, dtype=acc, device=q.device) for t in (rows, r.k, r.v))
        for t in _tiles(r, rows):
            found = flash_backward(
                do[:, :, t.rows], None if dx is None else dx[:, :, t.rows], rows[:, :, t.rows], r.k[:, :, t.keys],
                r.v[:, :, t.keys], o[:, :, t.rows], x[:, :, t.rows], False, scale, t.mask,
            )  # fmt: skip
            for total, g in zip((gq[:, :, t.rows], gk[:, :, t.keys], gv[:, :, t.keys]), found, strict=True):
                total += g
        _scatter(dq, r.rows, gq, hkv)
        gk = gk[0].transpose(0, 1)
        if keys.cos is not None and keys.sin is not None:
            gk = turn(gk, keys.cos[r.keys], -keys.sin[r.keys], keys.interleaved)
        dk[r.keys], dv[r.keys] = gk, gv[0].transpose(0, 1)
    return dq, dk, dv


def blocks(at: list[int], group: int, width: int) -> Iterator[Block]:
    """Blocks that hold every pair of a row at one of the sorted positions `at` and a key it sees, each once.

    Every row of a block sees a key of it. A row is `group` rows of a tile; `width` is a tile's heads times their size.
    """
    chunks = max(1, len(at) * group // CHUNK_ROWS)
    for a, b in itertools.pairwise(len(at) * c // chunks for c in range(chunks + 1)):
        yield from _cut(at, a, b, 0, group * width)


def _cut(at: list[int], a: int, b: int, start: int, width: int) -> Iterator[Block]:
    """Rows [a, b) and their keys from `start` on, which all of them see."""
    first, stop = at[a], at[b - 1] + 1
    if stop == first + 1 or (b - a) * (stop - start) * width < SPLIT_WORK:
        yield Block(a, b, start, stop, stop > first + 1)
    elif first > start:
        yield Block(a, b, start, first, False)
        yield from _cut(at, a, b, first, width)
    else:
        m = (a + b) // 2
        yield from _cut(at, a, m, start, width)
        if at[m] > start:
            yield Block(m, b, start, at[m], False)
        yield from _cut(at, m, b, at[m], width)


def _requests(keys: Keys, positions: Tensor, cu_q: Tensor) -> Iterator[Request]:
    """The requests that have rows with keys."""
    order = sort_rows(positions, cu_q).long()
    at, starts = positions[order].tolist(), keys.starts.tolist()
    for s, (a, b) in enumerate(itertools.pairwise(cu_q.tolist())):
        a = bisect.bisect_left(at, 0, a, b)
        if a < b:
            here = slice(starts[s], starts[s] + at[b - 1] + 1)
            yield Request(order[a:b], at[a:b], here, *_load(keys, s, here))


def _load(keys: Keys, s: int, here: slice) -> tuple[Tensor, Tensor]:
    """The first keys and values of request `s`; views where nothing has to be done."""
    if keys.table is None:
        k, v = keys.k[here], keys.v[here]
    else:
        count, size = here.stop - here.start, keys.k.shape[1]
        pages = keys.table[s, : -(-count // size)]
        k, v = (x.index_select(0, pages).flatten(0, 1)[:count] for x in (keys.k, keys.v))
    if keys.cos is not None and keys.sin is not None:
        k = turn(k, keys.cos[here], keys.sin[here], keys.interleaved)
    return k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def _tiles(r: Request, q: Tensor) -> Iterator[Tile]:
    group = q.shape[2] // len(r.at)
    for a, b, start, stop, masked in blocks(r.at, group, r.k.shape[1] * r.k.shape[3]):
        mask = _mask(r.at[a:b], start, stop, group, q) if masked else None
        yield Tile(slice(a * group, b * group), slice(start, stop), mask)


def _mask(at: list[int], start: int, stop: int, group: int, like: Tensor) -> Tensor:
    last = torch.tensor(at, device=like.device).repeat_interleave(group)
    hidden = torch.arange(start, stop, device=like.device) > last[:, None]
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)


def _gather(x: Tensor, rows: Tensor, hkv: int) -> Tensor:
    """Rows of `x [N, Hq, ...]` as a tile `[1, Hkv, n * group, ...]`: the heads of a group lie next to each other."""
    return x.index_select(0, rows).unflatten(1, (hkv, -1)).transpose(0, 1).flatten(1, 2)[None]


def _scatter(to: Tensor, rows: Tensor, x: Tensor, hkv: int) -> None:
    """The inverse of `_gather`, into `to [N, Hq, ...]`."""
    to.index_copy_(0, rows, x[0].unflatten(1, (len(rows), -1)).transpose(0, 1).flatten(1, 2).to(to.dtype))
