"""Dense attention over packed sequences, `(out, lse)` in one pass, tiled as FlashAttention (arXiv 2307.08691)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from .tiles import LN2, LOG2E, arch, cut, dot_rows, head_tile, job, load_rows, precision, store_rows, tile_rows


@triton.jit
def softmax_step(b_acc, b_m, b_l, b_s, b_v, scale, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """One online-softmax step in base 2. Masked scores come scaled, with -inf holes; others raw, with `scale >= 0`."""
    if MASK:
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
    else:
        b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_safe = b_new
        b_p = tl.exp2(b_s * scale - b_safe[:, None])
    b_shrink = tl.exp2(b_m - b_safe)
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
    return b_acc, b_new, b_l


@triton.jit
def _sweep(
    b_acc, b_m, b_l, b_q, q, o_q, m_row, k, v, k_t, v_t, begin, end, b_pos, len_k, window, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    for n0 in tl.range(begin, end, BLOCK_N):
        valid = n0 + o_n < len_k
        p_k = k + n0 * k_t.to(tl.int64)
        b_k = load_rows(p_k, o_n * k_t, valid, D, BLOCK_D, MASK)
        b_s = dot_rows(b_q, b_k, q, o_q, m_row, p_k, o_n * k_t, valid, D, PRECISION)
        if MASK:
            seen = valid[None, :]
            if CAUSAL:
                seen = seen & (n0 + o_n[None, :] <= b_pos[:, None])
            if WINDOW:
                seen = seen & (n0 + o_n[None, :] > b_pos[:, None] - window)
            b_s = tl.where(seen, b_s * scale, float("-inf"))
        b_v = load_rows(v + n0 * v_t.to(tl.int64), o_n * v_t, valid, D, BLOCK_D, MASK)
        b_acc, b_m, b_l = softmax_step(b_acc, b_m, b_l, b_s, b_v, scale, MASK, PRECISION)
    return b_acc, b_m, b_l


@triton.jit
def key_range(first_pos, last_pos, len_k, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Bounds, in whole key tiles, of what a tile of queries sees: [begin, inner) and [outer, end) need masks."""
    begin, inner = 0, 0
    end, outer = len_k, len_k // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(tl.maximum(last_pos + 1, 0), len_k)
        outer = tl.maximum(tl.minimum(first_pos + 1, len_k), 0) // BLOCK_N * BLOCK_N
    if WINDOW:
        begin = tl.maximum(first_pos - window + 1, 0) // BLOCK_N * BLOCK_N
        outer = tl.maximum(outer, begin)
        inner = tl.minimum(tl.cdiv(tl.maximum(last_pos - window + 1, 0), BLOCK_N) * BLOCK_N, outer)
    return begin, inner, outer, end


@triton.jit
def forward_kernel(
    q, k, v, sinks, out, lse, owner, first_tile, cu_q, cu_k, q_t, q_h, k_t, k_h, v_t, v_h, kv_heads, sequences,
    window, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    b_pos = o_i + len_k - len_q

    o_q = (start_q + o_i) * q_t + o_h * q_h
    b_q = load_rows(q, o_q, m_row, D, BLOCK_D, True)
    k += start_k * k_t + i_h * k_h
    v += start_k * v_t + i_h * v_h
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale *= LOG2E
    first_pos = row // HEADS + len_k - len_q
    last_pos = tl.minimum((row + BLOCK_M - 1) // HEADS, len_q - 1) + len_k - len_q
    begin, inner, outer, end = key_range(first_pos, last_pos, len_k, window, BLOCK_N, CAUSAL, WINDOW)
    if WINDOW:
        b_acc, b_m, b_l = _sweep(
            b_acc, b_m, b_l, b_q, q, o_q, m_row, k, v, k_t, v_t, begin, inner, b_pos, len_k, window, scale,
            D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True, PRECISION,
        )  # fmt: skip
    b_acc, b_m, b_l = _sweep(
        b_acc, b_m, b_l, b_q, q, o_q, m_row, k, v, k_t, v_t, inner, outer, b_pos, len_k, window, scale,
        D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, False, PRECISION,
    )  # fmt: skip
    b_acc, b_m, b_l = _sweep(
        b_acc, b_m, b_l, b_q, q, o_q, m_row, k, v, k_t, v_t, outer, end, b_pos, len_k, window, scale,
        D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True, PRECISION,
    )  # fmt: skip

    # Read again, or the addresses of both ends would live in registers through the loops.
    row = (i_tile - tl.load(first_tile + i_seq, volatile=True)) * BLOCK_M
    o_i, o_h, m_row = tile_rows(row, i_h, len_q, HEADS, BLOCK_M)
    if SINKS:
        b_acc, b_m, b_l = add_sink(b_acc, b_m, b_l, tl.load(sinks + o_h, mask=m_row, other=0.0))
    o_out = (start_q + o_i) * (kv_heads * HEADS) + o_h
    store_rows(out, o_out * D, m_row, b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None], D, BLOCK_D)
    tl.store(lse + o_out, tl.where(b_l == 0.0, float("-inf"), (b_m + tl.log2(b_l)) * LN2), mask=m_row)


@triton.jit
def add_sink(b_acc, b_m, b_l, b_sink):
    """A key without a value: it only adds to the denominator."""
    b_sink = b_sink.to(tl.float32) * LOG2E
    b_new = tl.maximum(b_m, b_sink)
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_shrink = tl.exp2(b_m - b_safe)
    return b_acc * b_shrink[:, None], b_new, b_l * b_shrink + tl.exp2(b_sink - b_safe)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`q [Nq, Hq, D]`, `k, v [Nk, Hkv, D]`, int32 `cu_q, cu_k [S+1]` -> `out [Nq, Hq, D]`, `lse [Nq, Hq]` float32.

    Queries sit at the end of their sequence; `window=w` keeps keys `p-w < j <= p`. No keys: out 0, lse -inf or sink.
    """
    nq, hq, d = q.shape
    kv_heads, sequences = k.shape[1], cu_q.numel() - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(nq, hq, dtype=torch.float32, device=q.device)
    if nq == 0:
        return out, lse
    if scale < 0:  # the unmasked phase takes the maximum before it scales
        q, scale = -q, -scale
    heads = hq // kv_heads
    config = configs.get("states.forward", arch(q), d, q.element_size())
    owner, first = cut(cu_q.diff() * heads, nq * heads, config["BLOCK_M"])
    forward_kernel[(owner.numel() * kv_heads,)](
        q, k, v, sinks, out, lse, owner, first, cu_q, cu_k,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], kv_heads, sequences, window or 0, scale,
        HEADS=heads, D=d, BLOCK_D=head_tile(d), CAUSAL=causal, WINDOW=window is not None, SINKS=sinks is not None,
        PRECISION=precision(q.dtype), **config,
    )  # fmt: skip
    return out, lse


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What the public functions launch, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict(q=x, k=x, v=x, out=x, sinks="*fp32", lse="*fp32", scale="fp32")
    types |= dict.fromkeys(("owner", "first_tile", "cu_q", "cu_k"), "*i32")
    shape = dict(HEADS=4, D=head_dim, BLOCK_D=head_tile(head_dim), PRECISION="tf32x3" if size == 4 else "tf32")
    config = configs.get("states.forward", arch, head_dim, size)
    modes = {"causal": (True, False), "window": (True, True), "full": (False, False)}
    return [
        job(f"states.forward[{name}]", forward_kernel, types,
            shape | dict(CAUSAL=causal, WINDOW=window, SINKS=window), config, dot=size == 2)
        for name, (causal, window) in modes.items()
    ]  # fmt: skip
