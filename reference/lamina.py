"""Lamina (arXiv 2405.01814) from its definitions: a row's new tokens over all keys before them."""

import math

import torch
from einops import rearrange
from torch import Tensor

from .states import State, accumulation_dtype, masked_attention


def split_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> State:
    """Every query of row `b` sees its first `lengths[b]` keys, by default all. Layouts as the public function's."""
    empty = k.new_empty(0, *k.shape[2:])
    return shared_prefix_decode(
        q, empty, empty, k, v, lengths=lengths, page_table=page_table, scale=scale, out_dtype=out_dtype
    )


def shared_prefix_decode(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> State:
    """Every query of row `b` sees the prefix `[t, g, d]` and then the row's own keys."""
    dtype = accumulation_dtype(q)
    out = torch.zeros(q.shape, dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for b in range(len(q)):
        length = k.shape[1] if lengths is None else int(lengths[b])
        keys, values = (
            torch.cat([prefix, _tokens(x, b, length, page_table)])[None] for prefix, x in ((k_prefix, k), (v_prefix, v))
        )
        seen = torch.ones(keys.shape[1], dtype=torch.bool, device=q.device)
        row, lse[b : b + 1] = masked_attention(q[b : b + 1].to(dtype), keys, values, seen, scale)
        out[b] = row[0].to(out.dtype)
    return out, lse


def _tokens(x: Tensor, row: int, length: int, table: Tensor | None) -> Tensor:
    """The keys or values of one row, `[j, g, d]`."""
    if table is None:
        return x[row, :length]
    pages = table[row, : -(-length // x.shape[1])].long()
    return rearrange(x[pages], "page j g d -> (page j) g d")[:length]
