"""k-means, first half of a round: the best centroid of every key, for all segments and heads of one length at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import arch, cdiv, dot_rows, head_tile, job, load_rows, ordered, precision


@triton.jit
def assign_kernel(
    x, centroids, labels, tokens, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of one problem's keys against its centroids; scores never leave registers."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    i_p = (tl.program_id(0) // tiles).to(tl.int64)
    o_m, o_n = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_m = o_m < tokens
    x += i_p * tokens * D
    b_x = load_rows(x, o_m * D, m_m, D, BLOCK_D, True)
    b_best = tl.full([BLOCK_M], -(2**31), tl.int32)
    b_label = tl.zeros([BLOCK_M], tl.int32)
    for n in tl.range(0, count, BLOCK_N):
        m_n = n + o_n < count
        p_c = centroids + (i_p * count + n) * D
        b_c = load_rows(p_c, o_n * D, m_n, D, BLOCK_D, True)
        b_s = dot_rows(b_x, b_c, x, o_m * D, m_m, p_c, o_n * D, m_n, D, PRECISION)
        b_s = tl.where(m_n[None, :], ordered(b_s), -(2**31))
        # Ties go to the lowest: the first in a tile, and a later tile must be better.
        b_top, b_first = tl.max(b_s, 1, return_indices=True, return_indices_tie_break_left=True)
        b_label = tl.where(b_top > b_best, n + b_first, b_label)
        b_best = tl.maximum(b_best, b_top)
    tl.store(labels + i_p * tokens + o_m, b_label, mask=m_m)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The best of `centroids [P, n, D]` for each key of `x [P, t, D]`, float32: `[P, t]` int32.

    By inner product, ties to the lowest, a NaN above everything.
    """
    (problems, tokens, dim), count = x.shape, centroids.shape[1]
    labels = torch.empty(problems, tokens, dtype=torch.int32, device=x.device)
    row = configs.get("retroinfer.assign", arch(x), dim, 4)
    assign_kernel[(cdiv(tokens, row["BLOCK_M"]) * problems,)](
        x.contiguous(), centroids.contiguous(), labels, tokens, count, D=dim, BLOCK_D=head_tile(dim),
        PRECISION=precision(x.dtype), **row,
    )  # fmt: skip
    return labels


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `assign` launches, for `kernels/compile.py`: keys minus their mean are float32."""
    types = dict(x="*fp32", centroids="*fp32", labels="*i32")
    shape = dict(D=head_dim, BLOCK_D=head_tile(head_dim), PRECISION="tf32x3")
    row = configs.get("retroinfer.assign", arch, head_dim, 4)
    return [job("retroinfer.assign", assign_kernel, types, shape, row, dot=False)]
