"""Lamina's decoding on Triton, under the names every backend has: shapes decide the launches, nothing is read back."""

import torch
from torch import Tensor

from . import decode as kernel
from .spec import Cache


def decode(q: Tensor, cache: Cache, scale: float, splits: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`out [B, Tq, Hq, D]` of `dtype` and `lse [B, Tq, Hq]` float32; 0 and -inf in rows without keys."""
    return _attend([(q, cache)], scale, splits, dtype)


def prefix_decode(
    q: Tensor, k_prefix: Tensor, v_prefix: Tensor, cache: Cache, scale: float, splits: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`decode` of rows that all see `k_prefix, v_prefix [T, Hkv, D]` first: those of one row, whose queries are all."""
    length = torch.full((1,), len(k_prefix), dtype=torch.int32, device=q.device)
    prefix = Cache(k_prefix[None], v_prefix[None], None, length)
    return _attend([(q, cache), (q.flatten(0, 1)[None], prefix)], scale, splits, dtype)


def _attend(
    parts: list[tuple[Tensor, Cache]], scale: float, splits: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    q = parts[0][0]
    with torch.cuda.device_of(q):
        passes = [kernel.plan(_dense(x), _ready(c), splits) for x, c in parts if x.numel() and kernel.capacity(c)]
        if not passes:
            lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
            return torch.zeros(q.shape, dtype=dtype, device=q.device), lse
        out, lse = kernel.decode(passes, scale, splits is None, dtype)
    return out.view(q.shape), lse.view(q.shape[:3])


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _ready(cache: Cache) -> Cache:
    table = None if cache.table is None else _dense(cache.table)
    return Cache(_dense(cache.k), _dense(cache.v), table, cache.lengths.contiguous())
