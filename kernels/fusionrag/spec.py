"""What the kernels of FusionRAG read: where keys and values lie, how far keys are turned, and the order of the rows.

Rows of all requests form one pack: `q [Nq, Hq, D]`, `positions int32 [Nq]`, `cu_q int32 [S + 1]`. Row `i` of a request
sees that request's keys `0..positions[i]`; position -1 sees none. Torch only.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Keys(NamedTuple):
    """Keys and values of `S` requests."""

    k: Tensor  # [Nk, Hkv, D], or [pages, page_size, Hkv, D] behind a table
    v: Tensor
    table: Tensor | None  # int32 [S, N]: where each `page_size` keys of a request lie; a page of one key is a slot
    starts: Tensor  # int64 [S]: row of a request's key 0 in `cos` and `sin`, and, without a table, in `k` and `v`
    lengths: Tensor  # int32 [S]
    cos: Tensor | None = None  # float32 [rows, rotary_dim // 2]: how far each key is turned while it is loaded
    sin: Tensor | None = None
    interleaved: bool = False


def request_of(cu_q: Tensor, rows: int) -> Tensor:
    """int64 `[rows]`: the request each row of a pack belongs to."""
    return torch.searchsorted(cu_q[1:], torch.arange(rows, dtype=cu_q.dtype, device=cu_q.device), right=True)


def sort_rows(positions: Tensor, cu_q: Tensor) -> Tensor:
    """int32 `[Nq]`: the rows, request by request, by rising position; equal ones stay in order. Asks no device."""
    request = request_of(cu_q, len(positions))
    return torch.argsort((request << 32) + positions, stable=True).to(torch.int32)
