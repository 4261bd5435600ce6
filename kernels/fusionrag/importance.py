"""How much a question attends each token: column sums of a softmax that is never held.

`norm_kernel` makes every row's maximum and sum of exponentials over every chunk; those of a row merge into its
context's. `sum_kernel` scores again, a tile of keys at a time, and adds up the probabilities of all rows: no atomics,
so results repeat. The two stay apart because their logarithm, at large scores, has no digits left for the sum.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import LOG2E, arch, cdiv, cut, dot_rows, head_tile, job, load_rows, precision, tile_rows

STAGES = ("fusionrag.norm", "fusionrag.sum")


@triton.jit
def norm_kernel(
    q, k, chunks, q_lengths, top, total, q_b, q_t, q_h, k_b, k_t, k_h, count, rows, scale,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of rows over one chunk: `top`, in log2, and `total [B, KV_HEADS, count, rows]`, to a question's end."""
    tiles = tl.cdiv(rows, BLOCK_M)
    row, i_list = tl.program_id(0) % tiles * BLOCK_M, tl.program_id(0) // tiles
    i_c, i_bh = i_list % count, i_list // count
    i_h, i_b = i_bh % KV_HEADS, (i_bh // KV_HEADS).to(tl.int64)
    tokens = tl.load(q_lengths + i_b)
    if row >= tokens * HEADS:
        return
    p_chunk = chunks + i_b * (count + 1) + i_c
    start, end = tl.load(p_chunk), tl.load(p_chunk + 1)
    o_i, o_h, m_row = tile_rows(row, i_h, tokens, HEADS, BLOCK_M)
    first = row // HEADS
    q += i_b * q_b + first.to(tl.int64) * q_t
    k += i_b * k_b + i_h.to(tl.int64) * k_h
    o_q = (o_i - first) * q_t + o_h * q_h
    b_q = load_rows(q, o_q, m_row, D, BLOCK_D, True)
    o_n = tl.arange(0, BLOCK_N)
    scale *= LOG2E
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(start, end, BLOCK_N):
        m_n = n + o_n < end
        p_k = k + n * k_t.to(tl.int64)
        b_k = load_rows(p_k, o_n * k_t, m_n, D, BLOCK_D, True)
        b_s = dot_rows(b_q, b_k, q, o_q, m_row, p_k, o_n * k_t, m_n, D, PRECISION) * scale
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_l = b_l * tl.exp2(b_m - b_safe) + tl.sum(tl.exp2(b_s - b_safe[:, None]), 1)
        b_m = b_new
    o_row = i_list.to(tl.int64) * rows + row + tl.arange(0, BLOCK_M)
    tl.store(top + o_row, b_m, mask=m_row)
    tl.store(total + o_row, b_l, mask=m_row)


@triton.jit
def sum_kernel(
    q, k, chunks, q_lengths, top, total, sums, owner, first_tile, q_b, q_t, q_h, k_b, k_t, k_h, batch, keys, count,
    rows, scale, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, PER_CHUNK: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of one chunk's keys for one KV head, added to `sums [KV_HEADS, B, keys]`."""
    i_h, i_tile = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    i_list = tl.load(owner + i_tile)
    if i_list >= batch * count:
        return
    i_c, i_b = i_list % count, (i_list // count).to(tl.int64)
    p_chunk = chunks + i_b * (count + 1) + i_c
    n = tl.load(p_chunk) + (i_tile - tl.load(first_tile + i_list)) * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    m_n = n + o_n < tl.load(p_chunk + 1)
    tokens = tl.load(q_lengths + i_b)
    q += i_b * q_b
    k += i_b * k_b + i_h.to(tl.int64) * k_h + n * k_t.to(tl.int64)
    o_norm = (i_b * KV_HEADS + i_h) * rows
    if PER_CHUNK:
        o_norm = o_norm * count + i_c * rows
    b_k = load_rows(k, o_n * k_t, m_n, D, BLOCK_D, True)
    scale *= LOG2E
    b_p = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for row in tl.range(0, tokens * HEADS, BLOCK_M):
        o_i, o_h, m_row = tile_rows(row, i_h, tokens, HEADS, BLOCK_M)
        first = row // HEADS
        p_q, o_q = q + first.to(tl.int64) * q_t, (o_i - first) * q_t + o_h * q_h
        b_q = load_rows(p_q, o_q, m_row, D, BLOCK_D, True)
        b_s = dot_rows(b_k, b_q, k, o_n * k_t, m_n, p_q, o_q, m_row, D, PRECISION) * scale
        o_row = o_norm + row + tl.arange(0, BLOCK_M)
        b_m = tl.load(top + o_row, mask=m_row, other=0.0)
        b_w = 1.0 / tl.load(total + o_row, mask=m_row, other=float("inf"))
        b_p += tl.exp2(b_s - b_m[None, :]) * b_w[None, :]
    p_sums = sums + (i_h * batch + i_b) * keys + n + o_n
    tl.store(p_sums, tl.load(p_sums, mask=m_n, other=0.0) + tl.sum(b_p, 1), mask=m_n)


def token_importance(
    q: Sequence[Tensor], k: Sequence[Tensor], chunks: Tensor, q_lengths: Tensor, per_chunk: bool, scale: float
) -> Tensor:
    """As `portable_importance.token_importance`; asks no device."""
    (batch, tokens, hq, dim), (_, keys, kv_heads, _) = q[0].shape, k[0].shape
    count, heads = chunks.shape[1] - 1, hq // kv_heads
    rows = tokens * heads
    sums = torch.zeros(kv_heads, batch, keys, dtype=torch.float32, device=chunks.device)
    if sums.numel() == 0 or rows == 0:
        return sums.sum(0)
    chunks, q_lengths = chunks.contiguous(), q_lengths.contiguous()
    top, total = torch.empty(2, batch, kv_heads, count, rows, dtype=torch.float32, device=chunks.device)
    shape = dict(KV_HEADS=kv_heads, HEADS=heads, D=dim, BLOCK_D=head_tile(dim), PRECISION=precision(q[0].dtype))
    first, second = (configs.get(stage, arch(q[0]), dim, q[0].element_size()) for stage in STAGES)
    with torch.cuda.device_of(chunks):
        owner, first_tile = cut(chunks.diff(dim=1).flatten(), batch * keys, second["BLOCK_N"])
        for ql, kl in zip(q, k, strict=True):
            ql, kl = _near(ql, max(ql.stride()[1:3])), _near(kl, kl.stride(1))
            strides = (*ql.stride()[:3], *kl.stride()[:3])
            norm_kernel[(cdiv(rows, first["BLOCK_M"]) * batch * kv_heads * count,)](
                ql, kl, chunks, q_lengths, top, total, *strides, count, rows, scale, **shape, **first
            )
            norms = (top, total) if per_chunk else _merged(top, total)
            sum_kernel[(owner.numel() * kv_heads,)](
                ql, kl, chunks, q_lengths, *norms, sums, owner, first_tile, *strides, batch, keys, count, rows, scale,
                PER_CHUNK=per_chunk, **shape, **second,
            )  # fmt: skip
    return sums.sum(0)


def _merged(top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """A row's maximum and sum over all of its chunks; empty ones have -inf and 0."""
    most = top.amax(2)
    return most, (total * (top - most[:, :, None]).exp2()).sum(2)


def _near(x: Tensor, stride: int) -> Tensor:
    """`x` with its last dimension dense and `stride` small enough for int32 offsets within a tile."""
    return x if x.stride(-1) == 1 and stride < 2**22 else x.contiguous()


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `token_importance` launches, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict(q=x, k=x, top="*fp32", total="*fp32", sums="*fp32", scale="fp32")
    types |= dict.fromkeys(("chunks", "q_lengths", "owner", "first_tile"), "*i32")
    shape = dict(KV_HEADS=8, HEADS=4, D=head_dim, BLOCK_D=head_tile(head_dim))
    shape["PRECISION"] = "tf32x3" if size == 4 else "tf32"
    first, second = (configs.get(stage, arch, head_dim, size) for stage in STAGES)
    return [
        job("fusionrag.norm", norm_kernel, types, shape, first, dot=size == 2),
        job("fusionrag.sum", sum_kernel, types, shape | {"PER_CHUNK": True}, second, dot=size == 2),
    ]
