"""Moving rotated keys, in one pass from where they lie to where they go.

Cosines and sines come ready, so that they are those of `attnlab.rope`: all heads, and mostly all layers, share them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import arch, cdiv, job


@triton.jit
def rotate_kernel(
    k, cos, sin, out, slots, tokens, k_b, k_t, k_h, c_b, c_t, o_n, o_h,
    SLOTS: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, (token, head) pairs; every row is read whole before it is written, so `out` may be `k`."""
    tiles = tl.cdiv(tokens * HEADS, BLOCK_M)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    i_t, i_h = (o_row // HEADS).to(tl.int64), (o_row % HEADS).to(tl.int64)
    m_row = i_t < tokens
    i_out = i_b * tokens + i_t
    if SLOTS:
        i_out = tl.load(slots + i_out, mask=m_row, other=-1).to(tl.int64)
        m_row = m_row & (i_out >= 0)
    p_k = k + (i_b * k_b + i_t * k_t + i_h * k_h)[:, None]
    p_out = out + (i_out * o_n + i_h * o_h)[:, None]
    o_p = tl.arange(0, BLOCK_P)[None, :]
    m_p = m_row[:, None] & (o_p < PAIRS)
    o_c = (i_b * c_b + i_t * c_t)[:, None] + o_p
    b_cos, b_sin = tl.load(cos + o_c, mask=m_p, other=0.0), tl.load(sin + o_c, mask=m_p, other=0.0)
    o_d = tl.arange(0, 2 * BLOCK_P)[None, :]
    m_d = m_row[:, None] & (o_d < 2 * PAIRS)
    if INTERLEAVED:
        b_k = tl.load(p_k + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_x, b_y = tl.split(tl.reshape(b_k, [BLOCK_M, BLOCK_P, 2]))
    else:
        b_x = tl.load(p_k + o_p, mask=m_p, other=0.0).to(tl.float32)
        b_y = tl.load(p_k + PAIRS + o_p, mask=m_p, other=0.0).to(tl.float32)
    if BLOCK_REST > 0:
        o_rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
        m_rest = m_row[:, None] & (o_rest < D)
        b_rest = tl.load(p_k + o_rest, mask=m_rest, other=0.0)
        tl.store(p_out + o_rest, b_rest, mask=m_rest)
    b_u, b_w = b_x * b_cos - b_y * b_sin, b_y * b_cos + b_x * b_sin
    if INTERLEAVED:
        b_out = tl.reshape(tl.join(b_u, b_w), [BLOCK_M, 2 * BLOCK_P])
        tl.store(p_out + o_d, b_out.to(out.dtype.element_ty), mask=m_d)
    else:
        tl.store(p_out + o_p, b_u.to(out.dtype.element_ty), mask=m_p)
        tl.store(p_out + PAIRS + o_p, b_w.to(out.dtype.element_ty), mask=m_p)


def rotate(
    k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor | None = None, slots: Tensor | None = None
) -> Tensor:
    """`k [B, T, Hkv, D]` turned by float32 `cos, sin [B or 1, T or 1, n]` or `[T or 1, n]`.

    Into a new tensor, or into `out [N, Hkv, D]` at `slots [B, T]`, -1 skipped. In place where each row is its own slot.
    """
    batch, tokens, heads, dim = k.shape
    k = k if k.stride(-1) == 1 else k.contiguous()
    found = torch.empty(k.shape, dtype=k.dtype, device=k.device) if out is None else out
    if k.numel() == 0:
        return found
    rows = found.flatten(0, 1) if out is None else out
    cos, sin = (x.contiguous().expand(batch, tokens, -1) for x in (cos, sin))
    row = configs.get("fusionrag.rotate", arch(k), dim, k.element_size())
    with torch.cuda.device_of(k):
        rotate_kernel[(cdiv(tokens * heads, row["BLOCK_M"]) * batch,)](
            k, cos, sin, rows, slots if slots is None else slots.contiguous(), tokens, *k.stride()[:3],
            *cos.stride()[:2], *rows.stride()[:2], SLOTS=slots is not None, INTERLEAVED=interleaved, HEADS=heads,
            **_shape(dim, cos.shape[-1]), **row,
        )  # fmt: skip
    return found


def _shape(dim: int, pairs: int) -> dict[str, int]:
    rest = dim - 2 * pairs
    block_rest = triton.next_power_of_2(rest) if rest else 0
    return dict(D=dim, PAIRS=pairs, BLOCK_P=triton.next_power_of_2(pairs), BLOCK_REST=block_rest)


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `rotate` launches, for `kernels/compile.py`."""
    types = dict(k=f"*{dtype}", out=f"*{dtype}", cos="*fp32", sin="*fp32", slots="*i32")
    config = configs.get("fusionrag.rotate", arch, head_dim, 4 if dtype == "fp32" else 2)
    modes = {"copy": (False, False, head_dim), "slots": (True, False, head_dim), "pairs": (True, True, head_dim // 2)}
    return [
        job(f"fusionrag.rotate[{name}]", rotate_kernel, types,
            dict(SLOTS=slots, INTERLEAVED=pairs, HEADS=8, **_shape(head_dim, dim // 2)), config, dot=False)
        for name, (slots, pairs, dim) in modes.items()
    ]  # fmt: skip
