"""Steps that dense and MoBA gradients share: delta, one tile of dK and dV, one tile of dQ, the sinks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LOG2E, cdiv, head_tile, load_lse, load_rows


@triton.jit
def delta_kernel(
    dout, out, dlse, delta, g_t, g_h, o_t, o_h, heads, rows,
    DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    i_t, i_h = o_row // heads, o_row % heads
    b_dout = load_rows(dout, i_t * g_t + i_h * g_h, m_row, D, BLOCK_D, True).to(tl.float32)
    b_out = load_rows(out, i_t * o_t + i_h * o_h, m_row, D, BLOCK_D, True).to(tl.float32)
    b_delta = tl.sum(b_dout * b_out, 1)
    if DLSE:
        b_delta -= tl.load(dlse + o_row, mask=m_row, other=0.0)
    tl.store(delta + o_row, b_delta, mask=m_row)


@triton.jit
def dkv_step(
    b_dk, b_dv, b_k, b_v, q, dout, lse, delta, o_q, o_g, o_l, m_row, seen, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of rows to the dK (yet without the scale) and dV of a tile of keys. Scores lie `[keys, rows]`."""
    b_q = load_rows(q, o_q, m_row, D, BLOCK_D, True)
    b_lse = load_lse(lse, o_l, m_row)
    b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2E) - b_lse[None, :])
    if MASK:
        b_p = tl.where(seen, b_p, 0.0)
    b_dout = load_rows(dout, o_g, m_row, D, BLOCK_D, True)
    b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
    b_delta = tl.load(delta + o_l, mask=m_row, other=0.0)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION) - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def dq_step(
    b_dq, b_q, b_dout, b_lse, b_delta, k, v, o_k, o_v, m_key, seen, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the dQ (yet without the scale) of a tile of rows."""
    b_k = load_rows(k, o_k, m_key, D, BLOCK_D, MASK)
    b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E) - b_lse[:, None])
    if MASK:
        b_p = tl.where(seen, b_p, 0.0)
    b_v = load_rows(v, o_v, m_key, D, BLOCK_D, MASK)
    b_ds = b_p * (tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


def preprocess(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """`delta = rowsum(dout * out) - dlse`, float32 `[Nq, Hq]`."""
    nq, heads, d = out.shape
    delta = torch.empty(nq, heads, dtype=torch.float32, device=out.device)
    if nq:
        dlse = None if dlse is None else dlse.contiguous()
        tile = max(1, 4096 // head_tile(d))
        delta_kernel[(cdiv(nq * heads, tile),)](
            dout, out, dlse, delta, *dout.stride()[:2], *out.stride()[:2], heads, nq * heads,
            DLSE=dlse is not None, D=d, BLOCK_D=head_tile(d), BLOCK_M=tile, num_warps=4,
        )  # fmt: skip
    return delta


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """`[Hq]` float32: a sink is a key whose value is zero, so its dS is `-P * delta`."""
    share = torch.exp(sinks.float() - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(share * delta).sum(0)
