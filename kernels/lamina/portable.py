"""Split decoding in plain PyTorch: any device, any float dtype, float64 included; fast on the CPU.

A row's keys are cut into shares, whose states are merged once. The query heads of a KV head are rows of one tile: no
head is copied and no mask is needed. Keys of 2 bytes are widened a piece at a time, small enough for a processor's
cache: PyTorch's CPU kernel is several times slower on few rows of them, and the states stay exact in float32.
"""

import math
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from ..states.portable import accumulator, flash, merge
from .spec import Cache

SHARE = 2048  # keys of a share, where the caller does not say how many shares there are
PIECE = 1 << 20  # elements of the keys that are widened or gathered at a time
LARGE_PAGE = 1024  # keys of a page from which on it is read where it lies

State = tuple[Tensor, Tensor]


def decode(q: Tensor, cache: Cache, scale: float, splits: int | None, dtype: torch.dtype) -> State:
    """out [B, Tq, Hq, D] of `dtype` and lse [B, Tq, Hq] float32 (float64); 0 and -inf in rows without keys."""
    return _merged(q, _decoded(q, cache, scale, splits), dtype)


def prefix_decode(
    q: Tensor, k_prefix: Tensor, v_prefix: Tensor, cache: Cache, scale: float, splits: int | None, dtype: torch.dtype
) -> State:
    """`decode` of rows that all see the keys of `k_prefix, v_prefix [T, Hkv, D]` first."""
    found = _decoded(q, cache, scale, splits)
    prefix = Cache(k_prefix[None], v_prefix[None], None, torch.tensor([len(k_prefix)], dtype=torch.int32))
    for _, out, lse in _decoded(q.flatten(0, 1)[None], prefix, scale, splits):
        found.append((slice(None), out.reshape(-1, *q.shape), lse.reshape(-1, *q.shape[:3])))
    return _merged(q, found, dtype)


def _decoded(q: Tensor, cache: Cache, scale: float, splits: int | None) -> list[tuple[slice, Tensor, Tensor]]:
    """Rows and the states `[shares, rows, Tq, Hq, D]` and `[shares, rows, Tq, Hq]` of some of their keys."""
    acc, (heads, d) = accumulator(q.dtype), cache.k.shape[-2:]
    piece = max(1, PIECE // (heads * d))
    tiles = q.unflatten(2, (heads, -1)).transpose(1, 2).flatten(2, 3).to(acc)
    # Allocated once: memory asked for piece by piece goes back to the system in between, which costs more than reading.
    room = q.new_empty(2, piece * heads * d, dtype=acc) if q.dtype != acc else None
    found = []
    for rows, length in _alike(cache, None if room is None else piece) if q.numel() else ():
        share = SHARE if splits is None else -(-length // splits)
        for k, v in _runs(cache, rows, length, piece):
            step = k.shape[1] if room is None else piece
            for a in range(0, k.shape[1], step):
                kp, vp = (x[:, a : a + step].transpose(1, 2) for x in (k, v))
                if room is not None:  # heads first, as the kernel's threads will share them
                    kp, vp = (to[: x.numel()].view(x.shape).copy_(x) for to, x in zip(room, (kp, vp), strict=True))
                for out, lse in _attend(tiles[rows], kp, vp, share, scale):
                    out, lse = (x.unflatten(3, (q.shape[1], -1)).transpose(2, 3).flatten(3, 4) for x in (out, lse))
                    found.append((rows, out, lse))
    return found


def _alike(cache: Cache, most: int | None) -> Iterator[tuple[slice, int]]:
    """Runs of rows with equally many keys, and how many; `most` keys at a time, row by row where there is a table."""
    first = 0
    for length, group in groupby(cache.lengths.tolist()):
        stop = first + len(list(group))
        step = stop - first if most is None else max(1, most // max(1, length))
        step = step if cache.table is None else 1
        if length:
            yield from ((slice(a, min(a + step, stop)), length) for a in range(first, stop, step))
        first = stop


def _runs(cache: Cache, rows: slice, length: int, piece: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys and values of some rows `[rows, t, Hkv, D]`, in turn; views, apart from small pages."""
    if cache.table is None:
        yield cache.k[rows, :length], cache.v[rows, :length]
        return
    size = cache.k.shape[1]
    pages = cache.table[rows.start, : -(-length // size)]
    if size >= LARGE_PAGE:
        for i, page in enumerate(pages.tolist()):
            yield tuple(x[page : page + 1, : length - i * size] for x in (cache.k, cache.v))
        return
    step = max(1, piece // size)
    room = cache.k.new_empty(2, min(step, len(pages)), *cache.k.shape[1:])
    for i in range(0, len(pages), step):
        some = pages[i : i + step]
        for to, x in zip(room, (cache.k, cache.v), strict=True):
            torch.index_select(x, 0, some, out=to[: len(some)])
        yield tuple(to[: len(some)].flatten(0, 1)[None, : length - i * size] for to in room)


def _attend(q: Tensor, k: Tensor, v: Tensor, share: int, scale: float) -> Iterator[State]:
    """States `[shares, b, h, r, d]` and `[shares, b, h, r]` of `q [b, h, r, d]` over `k, v [b, h, t, d]`."""
    whole = k.shape[2] // share * share
    if len(q) == 1 and whole > share:  # all shares in one call, so that one KV head keeps all threads busy
        kp, vp = (x[0, :, :whole].unflatten(1, (-1, share)).transpose(0, 1) for x in (k, v))
        out, lse = flash(q.expand(len(kp), -1, -1, -1), kp, vp, False, scale)
        yield out[:, None], lse[:, None]
    else:
        whole = 0
    for a in range(whole, k.shape[2], share):
        out, lse = flash(q, k[:, :, a : a + share], v[:, :, a : a + share], False, scale)
        yield out[None], lse[None]


def _merged(q: Tensor, found: list[tuple[slice, Tensor, Tensor]], dtype: torch.dtype) -> State:
    """The states of each row in one, 0 and -inf where it has none."""
    used, places = [0] * len(q), []
    for rows, _, lse in found:
        place = max(used[rows])
        used[rows] = [place + len(lse)] * len(used[rows])
        places.append(place)
    acc, shares = accumulator(q.dtype), max(used, default=0)
    outs = torch.zeros(max(1, shares), *q.shape, dtype=acc, device=q.device)
    lses = torch.full(outs.shape[:4], -math.inf, dtype=acc, device=q.device)
    for place, (rows, out, lse) in zip(places, found, strict=True):
        outs[place : place + len(lse), rows] = out
        lses[place : place + len(lse), rows] = lse
    if shares < 2:
        return outs[0].to(dtype), lses[0]
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=acc, device=q.device)
    merge(outs.flatten(1, 2), lses.flatten(1, 2), None, None, False, out.flatten(0, 1), lse.flatten(0, 1), None)
    return out, lse
