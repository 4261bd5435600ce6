"""Merge of attention states over disjoint keys, N at a time and in shard order, and its gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from .tiles import LN2, LOG2E, arch, cdiv, job

MAX_BLOCK_D = 256


@triton.jit
def _lse2(lses, i_n, stride_n, offset, valid):
    """A shard's lse in log2; +inf, as others write "no keys", is -inf."""
    b_lse = tl.load(lses + i_n * stride_n.to(tl.int64) + offset, mask=valid, other=float("-inf"))
    return tl.where(b_lse == float("inf"), float("-inf"), b_lse) * LOG2E


@triton.jit
def _load_weighted(outs, i_n, stride_n, offset, b_w, o_d, D):
    """Rows of shard `i_n` whose weight is not zero: the others may hold NaN."""
    p_out = outs + i_n * stride_n.to(tl.int64) + offset[:, None] + o_d[None, :]
    return tl.load(p_out, mask=(b_w != 0.0)[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def merge_kernel(
    outs,
    lses,
    out,
    lse,
    shards,
    rows,
    D,
    o_n,
    o_m,
    l_n,
    l_m,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_row = o_row < rows
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for i_n in tl.range(0, shards):
        b_max = tl.maximum(b_max, _lse2(lses, i_n, l_n, o_row * l_m, m_row))
    b_safe = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_n in tl.range(0, shards):
        b_w = tl.exp2(_lse2(lses, i_n, l_n, o_row * l_m, m_row) - b_safe)
        b_sum += b_w
        b_acc += b_w[:, None] * _load_weighted(outs, i_n, o_n, o_row * o_m, b_w, o_d, D)
    b_acc /= tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    p_out = out + o_row[:, None] * D + o_d[None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(lse + o_row, tl.where(b_sum == 0.0, float("-inf"), (b_safe + tl.log2(b_sum)) * LN2), mask=m_row)


@triton.jit
def merge_backward_kernel(
    dout, dlse, outs, lses, out, lse, douts, dlses, shards, rows, D, g_m, o_n, o_m, l_n, l_m,
    DLSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`w = exp(lse_n - lse)`: `dout_n = w dout`, `dlse_n = w (dout . (out_n - out) + dlse)`; zero for empty shards."""
    i_n = tl.program_id(1)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    b_lse = tl.load(lse + o_row, mask=m_row, other=0.0) * LOG2E
    b_w = tl.exp2(_lse2(lses, i_n, l_n, o_row * l_m, m_row) - tl.where(b_lse == float("-inf"), 0.0, b_lse))
    b_dot = tl.zeros([BLOCK_M], tl.float32)
    if DLSE:
        b_dot += tl.load(dlse + o_row, mask=m_row, other=0.0)
    for d0 in tl.range(0, D, BLOCK_D):
        o_d = d0 + tl.arange(0, BLOCK_D)
        mask = (b_w != 0.0)[:, None] & (o_d < D)[None, :]
        b_dout = tl.load(dout + (o_row * g_m)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_out = tl.load(out + (o_row * D)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_dot += tl.sum(b_dout * (_load_weighted(outs, i_n, o_n, o_row * o_m, b_w, o_d, D) - b_out), 1)
        p_douts = douts + (i_n * rows.to(tl.int64) + o_row)[:, None] * D + o_d[None, :]
        b_douts = tl.where(mask, b_w[:, None] * b_dout, 0.0)
        tl.store(p_douts, b_douts.to(douts.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])
    tl.store(dlses + i_n * rows.to(tl.int64) + o_row, tl.where(b_w == 0.0, 0.0, b_w * b_dot), mask=m_row)


def _rows_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiles(x: Tensor) -> dict[str, int]:
    d = x.shape[-1]
    block_d = min(triton.next_power_of_2(d), MAX_BLOCK_D)
    return configs.get("states.merge", arch(x), block_d, x.element_size()) | {"BLOCK_D": block_d}


def merge(outs: Tensor, lses: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """`outs [N, M, D]`, `lses [N, M]` float32 -> `out [M, D]`, `lse [M]`. An lse of -inf or +inf means no keys.

    `out` is of `dtype`, by default that of `outs`.
    """
    outs = _rows_last(outs)
    shards, rows, d = outs.shape
    out = torch.empty(rows, d, dtype=dtype or outs.dtype, device=outs.device)
    lse = torch.empty(rows, dtype=torch.float32, device=outs.device)
    if rows:
        tiles = _tiles(outs)
        grid = (cdiv(rows, tiles["BLOCK_M"]), cdiv(d, tiles["BLOCK_D"]))
        merge_kernel[grid](outs, lses, out, lse, shards, rows, d, *outs.stride()[:2], *lses.stride(), **tiles)
    return out, lse


def merge_backward(
    dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `merge` in the shapes of `outs` and `lses`."""
    outs, dout = _rows_last(outs), _rows_last(dout)
    shards, rows, d = outs.shape
    douts = torch.empty(outs.shape, dtype=outs.dtype, device=outs.device)
    dlses = torch.empty(lses.shape, dtype=lses.dtype, device=lses.device)
    if rows:
        tiles = _tiles(outs)
        dlse = None if dlse is None else dlse.contiguous()
        merge_backward_kernel[(cdiv(rows, tiles["BLOCK_M"]), shards)](
            dout, dlse, outs, lses, out.contiguous(), lse.contiguous(), douts, dlses, shards, rows, d,
            dout.stride(0), *outs.stride()[:2], *lses.stride(), DLSE=dlse is not None, **tiles,
        )  # fmt: skip
    return douts, dlses


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What the public functions launch, for `kernels/compile.py`."""
    x, f = f"*{dtype}", "*fp32"
    types = dict(dout=x, outs=x, out=x, douts=x, dlse=f, lses=f, lse=f, dlses=f)
    block_d = triton.next_power_of_2(head_dim)
    tiles = configs.get("states.merge", arch, block_d, 4 if dtype == "fp32" else 2) | {"BLOCK_D": block_d}
    return [
        job("states.merge", merge_kernel, types, {}, tiles, dot=False),
        job("states.merge_backward", merge_backward_kernel, types, {"DLSE": True}, tiles, dot=False),
    ]
