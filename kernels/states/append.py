"""Each query's own new key joins its attention state: score, weights and sum in one pass."""

import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from .merge import MAX_BLOCK_D, finite, load_lse, log, place, power, split, tiles
from .tiles import LOG2E, cdiv, job, processors


@triton.jit
def append_kernel(
    out_prev, lse_prev, q, k, v, out, lse, rows, heads, D, scale, o_m, o_h, l_m, l_h, q_m, q_h, k_m, k_h, v_m, v_h,
    t_m, t_h, x_m, x_h,
    HEADS: tl.constexpr, BASE2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row is a query and one of its heads, `HEADS` of which share a key."""
    o_row = place(rows, BLOCK_M)[1] * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    i_m, i_h = split(o_row, heads)
    i_g = ((o_row % heads) // HEADS).to(tl.int64)
    b_s = tl.zeros([BLOCK_M], tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_d < D)[None, :]
        b_q = tl.load(q + (i_m * q_m + i_h * q_h)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_k = tl.load(k + (i_m * k_m + i_g * k_h)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_s += tl.sum(b_q * b_k, 1)
    b_s *= scale * LOG2E if BASE2 else scale
    b_lse = load_lse(lse_prev, i_m * l_m + i_h * l_h, m_row)
    b_top = finite(tl.maximum(b_lse, b_s))
    b_before, b_new = power(b_lse - b_top, BASE2), power(b_s - b_top, BASE2)
    b_sum = b_before + b_new
    b_some = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_share = 1.0 / b_some
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        p_old = out_prev + (i_m * o_m + i_h * o_h)[:, None] + o_d[None, :]
        b_old = tl.load(p_old, mask=(m_row & (b_before != 0.0))[:, None] & m_d, other=0.0).to(tl.float32)
        p_v = v + (i_m * v_m + i_g * v_h)[:, None] + o_d[None, :]
        b_v = tl.load(p_v, mask=m_row[:, None] & m_d, other=0.0).to(tl.float32)
        b_out = b_old * (b_before * b_share)[:, None] + b_v * (b_new * b_share)[:, None]
        p_out = out + (i_m * t_m + i_h * t_h)[:, None] + o_d[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_row[:, None] & m_d)
    tl.debug_barrier()  # no thread reads the old lse any more: it may lie where the new one goes
    b_joint = tl.where(b_sum == 0.0, float("-inf"), b_top + log(b_some, BASE2))
    tl.store(lse + i_m * x_m + i_h * x_h, b_joint, mask=m_row)


def _one_warp(config: dict[str, int]) -> dict[str, int]:
    return {"BLOCK_M": max(1, config["BLOCK_M"] // config["num_warps"]), "num_warps": 1}


def append(
    out_prev: Tensor,
    lse_prev: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    base2: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`k, v [M, Hkv, D]` join `out_prev [M, Hq, D]`, `lse_prev [M, Hq]` in `out`, `lse`, as in the portable one."""
    heads, d, rows = q.shape[1], q.shape[2], q.shape[0] * q.shape[1]
    if not rows:
        return
    out_prev, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (out_prev, q, k, v))
    config = tiles(q)
    if cdiv(rows, config["BLOCK_M"]) < processors(q):
        config |= _one_warp(config)
    strides = [step for x in (out_prev, lse_prev, q, k, v, out, lse) for step in x.stride()[:2]]
    append_kernel[(cdiv(rows, config["BLOCK_M"]),)](
        out_prev, lse_prev, q, k, v, out, lse, rows, heads, d, scale, *strides,
        HEADS=heads // k.shape[1], BASE2=base2, **config,
    )  # fmt: skip


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `append_token` launches, for `kernels/compile.py`."""
    x, f = f"*{dtype}", "*fp32"
    types = dict.fromkeys(("out_prev", "q", "k", "v", "out"), x) | dict(lse_prev=f, lse=f, scale="fp32")
    block_d = min(triton.next_power_of_2(head_dim), MAX_BLOCK_D)
    row = configs.get("states.merge", arch, block_d, 4 if dtype == "fp32" else 2) | {"BLOCK_D": block_d}
    few = row | _one_warp(row)
    shape = dict(HEADS=4, BASE2=False)
    return [
        job("states.append", append_kernel, types, shape, row, dot=False),
        job("states.append[few]", append_kernel, types | {"out_prev": f, "out": f}, shape, few, dot=False),
    ]
