"""Decode attention from C kernels for CPUs: split over keys, few rows where keys lie, many over packed tiles.

No result depends on the number of threads: keys are split by the call alone, and joined in order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..lamina.spec import Cache
from ..moba.spec import cdiv
from .module import ELEMENTS, call, dense

FEW_ROWS = 16  # rows (queries times heads of a group) that read keys where they lie: packing them costs more
MANY_ROWS = 512  # of one item: packing pays, their state fits the caches
LEAST_SPAN, MOST_SPAN, STEP = 512, 4096, 64  # keys of one item, in steps that few rows take
ITEMS = 64  # that are enough to keep threads busy
PART_BYTES = 64 << 20  # of the states that are joined
TOKEN_BYTES = 2048  # heads of a token that lie next to each other are read together, up to so many bytes
THREAD_BYTES = 256 << 10  # a thread that reads less is not worth its start
JOIN_BYTES = 1 << 20  # nor one that joins less, which was written just now

State = tuple[Tensor, Tensor]


class Share(NamedTuple):
    """Queries `[B, Tq, Hq, D]` and the cache they attend, as the kernel reads them: their last dimension is dense."""

    q: Tensor
    cache: Cache
    span: int  # keys of an item
    spans: int  # of the longest row


def decode(q: Tensor, cache: Cache, scale: float, splits: int | None, dtype: torch.dtype) -> State:
    """out [B, Tq, Hq, D] in dtype and lse [B, Tq, Hq] float32. Raises ValueError where a page does not exist."""
    return decode_joined([q], [cache], scale, splits, dtype)


def prefix_decode(
    q: Tensor, k_prefix: Tensor, v_prefix: Tensor, cache: Cache, scale: float, splits: int | None, dtype: torch.dtype
) -> State:
    """The same after `k_prefix, v_prefix [T, Hkv, D]`, which all rows see and which are read once for all of them."""
    length = torch.tensor([len(k_prefix)], dtype=torch.int32)
    prefix = Cache(k_prefix[None], v_prefix[None], None, length)
    return decode_joined([q, q.flatten(0, 1)[None]], [cache, prefix], scale, splits, dtype)


def decode_joined(
    queries: list[Tensor], caches: list[Cache], scale: float, splits: int | None, dtype: torch.dtype
) -> State:
    """The state over the keys of all caches together, of the same queries, in the shape of the first ones."""
    shares = [_share(q, cache, splits) for q, cache in zip(queries, caches, strict=True)]
    return _attend(shares, [(0, len(shares))], scale, dtype)[0]


def decode_apart(
    queries: list[Tensor], caches: list[Cache], scale: float, splits: int | None, dtype: torch.dtype
) -> list[State]:
    """`decode` of each cache, all in one call."""
    shares = [_share(q, cache, splits) for q, cache in zip(queries, caches, strict=True)]
    return _attend(shares, [(i, i + 1) for i in range(len(shares))], scale, dtype)


def _share(q: Tensor, cache: Cache, splits: int | None) -> Share:
    q, table = dense(q), cache.table
    if len(cache.lengths) == 1:  # its queries are tokens of one row, if they are not already
        q = q.flatten(0, 1)[None]
    lengths, table = cache.lengths.contiguous(), None if table is None else table.contiguous()
    return Share(q, Cache(dense(cache.k), dense(cache.v), table, lengths), *_spans(q, cache, splits))


def _spans(q: Tensor, cache: Cache, splits: int | None) -> tuple[int, int]:
    """Keys of a span, which the shape of the call decides, and how many spans the longest row has."""
    (batch, tokens, hq, dim), (page, hkv) = q.shape, cache.k.shape[1:3]
    keys = page * (1 if cache.table is None else cache.table.shape[1])
    if splits is None:
        span = max(LEAST_SPAN, min(MOST_SPAN, cdiv(batch * hkv * keys, ITEMS)))
        span = max(span, cdiv(4 * batch * tokens * hq * (dim + 2) * keys, PART_BYTES))
    else:
        span = cdiv(keys, splits)
    span = max(1, cdiv(span, STEP)) * STEP
    return span, cdiv(int(cache.lengths.max()), span) if q.numel() else 0


def _attend(shares: list[Share], results: list[tuple[int, int]], scale: float, dtype: torch.dtype) -> list[State]:
    """The state of each range of shares. Every span of a share's keys leaves a state of its own, joined at the end."""
    dim, threads = shares[0].q.shape[3], torch.get_num_threads()
    sizes = [x.spans * x.q.numel() // dim * (dim + 2) for x in shares]
    parts = torch.empty(sum(sizes), dtype=torch.float32)
    at, starts = parts.data_ptr(), []
    for size in sizes:
        starts.append(at)
        at += 4 * size
    states, joins = [], []
    for begin, end in results:
        q = shares[begin].q
        out, lse = torch.empty(q.shape, dtype=torch.float32), torch.empty(q.shape[:3], dtype=torch.float32)
        spans = sum(x.spans for x in shares[begin:end])
        joins += [starts[begin], out.data_ptr(), lse.data_ptr(), lse.numel(), spans]
        states.append((out, lse))
    rows = [_row(x, start) for x, start in zip(shares, starts, strict=True)]
    numbers, joined = torch.tensor(rows, dtype=torch.int64), torch.tensor(joins, dtype=torch.int64)
    call(
        "split", numbers, len(rows), joined, len(results), ELEMENTS[shares[0].q.dtype], dim, float(scale),
        max(1, min(threads, cdiv(sum(map(_bytes, shares)), THREAD_BYTES))),
        max(1, min(threads, cdiv(parts.nbytes, JOIN_BYTES))),
    )  # fmt: skip
    return [(out.to(dtype), lse) for out, lse in states]


def _row(x: Share, parts: int) -> list[int]:
    """`struct Split` of split.c up to its `first`."""
    q, (k, v, table, lengths) = x.q, x.cache
    (batch, tokens, hq, _), (pages, page, hkv) = q.shape, k.shape[:3]
    few = tokens * hq // hkv <= FEW_ROWS
    chunk = max(1, tokens if few else MANY_ROWS * hkv // hq)
    return [
        q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if table is None else table.data_ptr(), lengths.data_ptr(), parts,
        batch, tokens, hq, hkv, pages, page, 0 if table is None else table.shape[1], x.span, x.spans, int(few),
        _together(k) if few else 1, chunk, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
    ]  # fmt: skip


def _bytes(x: Share) -> int:
    """What the share reads, about."""
    (batch, tokens, hq, dim), (page, hkv) = x.q.shape, x.cache.k.shape[1:3]
    keys = min(x.span * x.spans, page * (1 if x.cache.table is None else x.cache.table.shape[1]))
    return batch * keys * hkv * dim * 2 * x.q.element_size() * cdiv(tokens * hq // hkv, FEW_ROWS)


def _together(k: Tensor) -> int:
    """KV heads that one item takes."""
    if k.stride(2) != k.shape[3]:
        return 1
    return max(1, min(k.shape[2], TOKEN_BYTES // (k.shape[3] * k.element_size())))
