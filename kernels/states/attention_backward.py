"""Gradients of dense attention: a kernel per key tile for dK and dV, one per query tile for dQ, no atomics.

P is recomputed from the lse. `delta = rowsum(dout * out) - dlse`, so that `dS = P * (dP - delta)` holds both gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from .attention import key_range
from .gradients import delta_kernel, dkv_step, dq_step, preprocess, sink_gradient
from .tiles import arch, cut, head_tile, job, load_lse, load_rows, precision, store_rows, tile_rows


@triton.jit
def _dkv_sweep(
    b_dk, b_dv, b_k, b_v, q, dout, lse, delta, q_t, q_h, g_t, g_h, begin, end, i_h, heads, n0, shift, window, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows [begin, end) of a sequence; `shift` turns a query's index into its position."""
    o_n = n0 + tl.arange(0, BLOCK_N)
    for row in tl.range(begin, end, BLOCK_M):
        o_row = row + tl.arange(0, BLOCK_M)
        o_i, o_h, m_row = o_row // HEADS, i_h * HEADS + o_row % HEADS, o_row < end
        seen = m_row[None, :]
        if CAUSAL:
            seen = seen & (o_n[:, None] <= o_i[None, :] + shift)
        if WINDOW:
            seen = seen & (o_n[:, None] > o_i[None, :] + shift - window)
        o_t = o_i.to(tl.int64)
        b_dk, b_dv = dkv_step(
            b_dk, b_dv, b_k, b_v, q, dout, lse, delta, o_t * q_t + o_h * q_h, o_t * g_t + o_h * g_h, o_t * heads + o_h,
            m_row, seen, scale, D, BLOCK_D, MASK, PRECISION,
        )  # fmt: skip
    return b_dk, b_dv


@triton.jit
def dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, owner, first_tile, cu_q, cu_k, q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h,
    kv_heads, sequences, window, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Causal key tiles shrink along a sequence: the longest start first.
    i_tile, i_h = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    i_seq = tl.load(owner + i_tile)
    if i_seq >= sequences:
        return
    start_q, start_k = tl.load(cu_q + i_seq).to(tl.int64), tl.load(cu_k + i_seq).to(tl.int64)
    len_q = (tl.load(cu_q + i_seq + 1) - start_q).to(tl.int32)
    len_k = (tl.load(cu_k + i_seq + 1) - start_k).to(tl.int32)
    shift = len_k - len_q
    n0 = (i_tile - tl.load(first_tile + i_seq)) * BLOCK_N
    o_n = n0 + tl.arange(0, BLOCK_N)
    b_k = load_rows(k + start_k * k_t + i_h * k_h, o_n.to(tl.int64) * k_t, o_n < len_k, D, BLOCK_D, True)
    b_v = load_rows(v + start_k * v_t + i_h * v_h, o_n.to(tl.int64) * v_t, o_n < len_k, D, BLOCK_D, True)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    heads = kv_heads * HEADS
    q += start_q * q_t
    dout += start_q * g_t
    lse += start_q * heads
    delta += start_q * heads

    # Rows [begin, inner) and [outer, end) see only a part of the keys.
    begin, end = 0, len_q * HEADS
    inner, outer = begin, end
    if CAUSAL:
        begin = tl.maximum(n0 - shift, 0) * HEADS
        partial = tl.maximum(n0 + BLOCK_N - 1 - shift, 0) * HEADS - begin
        inner = tl.minimum(begin + tl.cdiv(partial, BLOCK_M) * BLOCK_M, end)
    if WINDOW:
        end = tl.minimum(tl.maximum(n0 + BLOCK_N - 1 + window - shift, 0) * HEADS, end)
        inner = tl.minimum(inner, end)
        outer = tl.minimum(tl.maximum(tl.maximum(n0 + window - shift, 0) * HEADS, inner), end)
        outer = inner + (outer - inner) // BLOCK_M * BLOCK_M
    if CAUSAL:
        b_dk, b_dv = _dkv_sweep(
            b_dk, b_dv, b_k, b_v, q, dout, lse, delta, q_t, q_h, g_t, g_h, begin, inner, i_h, heads, n0, shift, window,
            scale, HEADS, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, True, PRECISION,
        )  # fmt: skip
    b_dk, b_dv = _dkv_sweep(
        b_dk, b_dv, b_k, b_v, q, dout, lse, delta, q_t, q_h, g_t, g_h, inner, outer, i_h, heads, n0, shift, window,
        scale, HEADS, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, False, PRECISION,
    )  # fmt: skip
    if WINDOW:
        b_dk, b_dv = _dkv_sweep(
            b_dk, b_dv, b_k, b_v, q, dout, lse, delta, q_t, q_h, g_t, g_h, outer, end, i_h, heads, n0, shift, window,
            scale, HEADS, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, True, PRECISION,
        )  # fmt: skip

    # Read again, or the addresses of both ends would live in registers through the loops.
    o_n = (i_tile - tl.load(first_tile + i_seq, volatile=True)) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_out = ((start_k + o_n) * kv_heads + i_h) * D
    store_rows(dk, o_out, o_n < len_k, b_dk * scale, D, BLOCK_D)
    store_rows(dv, o_out, o_n < len_k, b_dv, D, BLOCK_D)


@triton.jit
def _dq_sweep(
    b_dq, b_q, b_dout, b_lse, b_delta, k, v, k_t, v_t, begin, end, b_pos, len_k, window, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    for n0 in tl.range(begin, end, BLOCK_N):
        valid = n0 + o_n < len_k
        seen = valid[None, :]
        if CAUSAL:
            seen = seen & (n0 + o_n[None, :] <= b_pos[:, None])
        if WINDOW:
            seen = seen & (n0 + o_n[None, :] > b_pos[:, None] - window)
        b_dq = dq_step(
            b_dq, b_q, b_dout, b_lse, b_delta, k + n0 * k_t.to(tl.int64), v + n0 * v_t.to(tl.int64),
            o_n * k_t, o_n * v_t, valid, seen, scale, D, BLOCK_D, MASK, PRECISION,
        )  # fmt: skip
    return b_dq


@triton.jit
def dq_kernel(
    q, k, v, dout, lse, delta, dq, owner, first_tile, cu_q, cu_k, q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h, kv_heads,
    sequences, window, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Causal tiles grow along a sequence: the longest start first.
    i_tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // kv_heads
    i_h = tl.program_id(0) % kv_heads
    i_seq = tl.load(owner + i_tile)
    if i_seq >= sequences:
        return
    start_q, start_k = tl.load(cu_q + i_seq).to(tl.int64), tl.load(cu_k + i_seq).to(tl.int64)
    len_q = (tl.load(cu_q + i_seq + 1) - start_q).to(tl.int32)
    len_k = (tl.load(cu_k + i_seq + 1) - start_k).to(tl.int32)
    row = (i_tile - tl.load(first_tile + i_seq)) * BLOCK_M
    o_i, o_h, m_row = tile_rows(row, i_h, len_q, HEADS, BLOCK_M)
    heads = kv_heads * HEADS
    b_q = load_rows(q, (start_q + o_i) * q_t + o_h * q_h, m_row, D, BLOCK_D, True)
    b_dout = load_rows(dout, (start_q + o_i) * g_t + o_h * g_h, m_row, D, BLOCK_D, True)
    b_lse = load_lse(lse, (start_q + o_i) * heads + o_h, m_row)
    b_delta = tl.load(delta + (start_q + o_i) * heads + o_h, mask=m_row, other=0.0)
    k += start_k * k_t + i_h * k_h
    v += start_k * v_t + i_h * v_h
    b_pos = o_i + len_k - len_q
    first_pos = row // HEADS + len_k - len_q
    last_pos = tl.minimum((row + BLOCK_M - 1) // HEADS, len_q - 1) + len_k - len_q
    begin, inner, outer, end = key_range(first_pos, last_pos, len_k, window, BLOCK_N, CAUSAL, WINDOW)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW:
        b_dq = _dq_sweep(
            b_dq, b_q, b_dout, b_lse, b_delta, k, v, k_t, v_t, begin, inner, b_pos, len_k, window, scale,
            D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True, PRECISION,
        )  # fmt: skip
    b_dq = _dq_sweep(
        b_dq, b_q, b_dout, b_lse, b_delta, k, v, k_t, v_t, inner, outer, b_pos, len_k, window, scale,
        D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, False, PRECISION,
    )  # fmt: skip
    b_dq = _dq_sweep(
        b_dq, b_q, b_dout, b_lse, b_delta, k, v, k_t, v_t, outer, end, b_pos, len_k, window, scale,
        D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True, PRECISION,
    )  # fmt: skip
    # Read again, or the addresses of both ends would live in registers through the loops.
    row = (i_tile - tl.load(first_tile + i_seq, volatile=True)) * BLOCK_M
    o_i, o_h, m_row = tile_rows(row, i_h, len_q, HEADS, BLOCK_M)
    store_rows(dq, ((start_q + o_i) * heads + o_h) * D, m_row, b_dq * scale, D, BLOCK_D)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attention` for `dout [Nq, Hq, D]`, `dlse [Nq, Hq]`: like `q, k, v`, and `dsinks [Hq]` float32."""
    (nq, hq, d), (nk, kv_heads, _) = q.shape, k.shape
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = preprocess(dout, out, dlse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    heads, sequences = hq // kv_heads, cu_q.numel() - 1
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    shape = dict(HEADS=heads, D=d, BLOCK_D=head_tile(d), CAUSAL=causal, WINDOW=window is not None)
    shape["PRECISION"] = precision(q.dtype)
    lse = lse.contiguous()

    def launch(kernel, name: str, tile: str, lengths: Tensor, rows: int, *grads: Tensor) -> None:
        config = configs.get(name, arch(q), d, q.element_size())
        owner, first = cut(lengths, rows, config[tile])
        if owner.numel():
            kernel[(owner.numel() * kv_heads,)](
                q, k, v, dout, lse, delta, *grads, owner, first, cu_q, cu_k, *strides, kv_heads, sequences,
                window or 0, scale, **shape, **config,
            )  # fmt: skip

    launch(dkv_kernel, "states.dkv", "BLOCK_N", cu_k.diff(), nk, dk, dv)
    launch(dq_kernel, "states.dq", "BLOCK_M", cu_q.diff() * heads, nq * heads, dq)
    return dq, dk, dv, None if sinks is None else sink_gradient(sinks, lse, delta)


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `attention_backward` launches, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict.fromkeys(("q", "k", "v", "dout", "out", "dq", "dk", "dv"), x) | {"scale": "fp32"}
    types |= dict.fromkeys(("lse", "delta", "dlse"), "*fp32")
    types |= dict.fromkeys(("owner", "first_tile", "cu_q", "cu_k"), "*i32")
    shape = dict(D=head_dim, BLOCK_D=head_tile(head_dim))
    dots = shape | dict(HEADS=4, PRECISION="tf32x3" if size == 4 else "tf32")
    jobs = [
        job(f"states.{name}[{mode}]", kernel, types, dots | dict(CAUSAL=causal, WINDOW=window),
            configs.get(f"states.{name}", arch, head_dim, size), dot=size == 2)
        for name, kernel in (("dkv", dkv_kernel), ("dq", dq_kernel))
        for mode, (causal, window) in {"causal": (True, False), "window": (True, True), "full": (False, False)}.items()
    ]  # fmt: skip
    tile = {"BLOCK_M": 4096 // shape["BLOCK_D"], "num_warps": 4}
    return [*jobs, job("states.delta", delta_kernel, types, shape | {"DLSE": True}, tile, dot=False)]
