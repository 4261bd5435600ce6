"""What the Triton stages share: which tile a program owns, how wide a head is padded, loads of a head's rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .spec import Geometry, cdiv

TYPES = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}


def work_items(counts: Tensor, tile: int, bound: int) -> tuple[Tensor, Tensor]:
    """Cut owners with `counts` rows each into tiles of `tile` rows, without asking the device how many there are.

    Returns `owner [bound]`, `len(counts)` for items past the last tile, and `first [n + 1]`, each owner's first item;
    both int32. Owners' items are in order, so `item - first[owner]` is the tile within its owner.
    """
    first = counts.new_zeros(counts.numel() + 1, dtype=torch.int32)
    torch.cumsum(cdiv(counts, tile), 0, dtype=torch.int32, out=first[1:])
    items = torch.arange(bound, device=counts.device, dtype=torch.int32)
    return torch.searchsorted(first[1:], items, right=True, out_int32=True), first


def most_items(rows: int, owners: int, tile: int) -> int:
    """How many tiles `rows` rows spread over `owners` owners can make at most."""
    return min(rows // tile + owners, rows)


def segment(geo: Geometry, q_start: int, q_end: int) -> Geometry:
    """The geometry of queries `q_start..q_end-1` alone; keys and blocks stay as they are."""
    cu_q = geo.cu_q.clamp(q_start, q_end) - q_start
    return geo._replace(cu_q=cu_q, query_seq=geo.query_seq[q_start:q_end], query_pos=geo.query_pos[q_start:q_end])


@triton.jit
def load_rows(p_rows, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ALL_ROWS: tl.constexpr):
    """Load `[rows, BLOCK_D]` from a pointer per row; zeros past `D` and, unless `ALL_ROWS`, where `m_rows` is false."""
    i_d = tl.arange(0, BLOCK_D)
    p = p_rows[:, None] + i_d[None, :]
    if BLOCK_D <= D:
        if ALL_ROWS:
            x = tl.load(p)
        else:
            x = tl.load(p, mask=m_rows[:, None], other=0.0)
    else:
        m = i_d[None, :] < D
        if not ALL_ROWS:
            m = m & m_rows[:, None]
        x = tl.load(p, mask=m, other=0.0)
    return x


@triton.jit
def store_rows(p_rows, x, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store `[rows, BLOCK_D]` through a pointer per row, in the pointer's type."""
    i_d = tl.arange(0, BLOCK_D)
    m = m_rows[:, None]
    if BLOCK_D > D:
        m = m & (i_d[None, :] < D)
    tl.store(p_rows[:, None] + i_d[None, :], x.to(p_rows.dtype.element_ty), mask=m)
