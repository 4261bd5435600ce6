"""k-means, second half of a round: the direction of each cluster's sum, member by member in token order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import arch, head_tile, job, load_rows
from .portable_kmeans import by_label


@triton.jit
def update_kernel(
    x, order, begin, old, new, tokens, clusters,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per cluster: its members are a run of `order`. A sum without a direction keeps the old centroid."""
    i_c = tl.program_id(0)
    start = tl.load(begin + i_c)
    stop = tl.load(begin + i_c + 1, mask=i_c + 1 < clusters, other=tokens)
    o_n, o_d = tl.arange(0, BLOCK_N).to(tl.int64), tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for n in tl.range(start, stop, BLOCK_N):
        m_n = n + o_n < stop
        o_x = tl.load(order + n + o_n, mask=m_n, other=0) * D
        b_sum += tl.sum(load_rows(x, o_x, m_n, D, BLOCK_D, True), 0)
    norm = tl.sqrt(tl.sum(b_sum * b_sum, 0))
    o_c = i_c.to(tl.int64) * D + o_d
    b_old = tl.load(old + o_c, mask=o_d < D, other=0.0)
    b_new = tl.where(norm > 0.0, b_sum / tl.where(norm > 0.0, norm, 1.0), b_old)
    tl.store(new + o_c, b_new, mask=o_d < D)


def update(x: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """New `centroids [P, n, D]` of keys `x [P, t, D]` in the clusters `labels [P, t]`, the same bits each time."""
    problems, count, dim = centroids.shape
    order, begin = by_label(labels, count)
    x, old = x.contiguous(), centroids.contiguous()
    new = torch.empty_like(old)
    update_kernel[(problems * count,)](
        x, order, begin, old, new, order.numel(), problems * count, D=dim, BLOCK_D=head_tile(dim),
        **configs.get("retroinfer.update", arch(x), dim, 4),
    )  # fmt: skip
    return new


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `update` launches, for `kernels/compile.py`."""
    types = dict(x="*fp32", order="*i64", begin="*i64", old="*fp32", new="*fp32")
    shape = dict(D=head_dim, BLOCK_D=head_tile(head_dim))
    row = configs.get("retroinfer.update", arch, head_dim, 4)
    return [job("retroinfer.update", update_kernel, types, shape, row, dot=False)]
