"""Stage 1: score every centroid, and reduce the scores of a group's query heads to one rank per cluster and KV head.

`score_kernel` reads each centroid once for all heads that share it; `rank_kernel` needs every head's logsumexp, so it
comes after. The scores stay in memory: the estimation zone and the error bounds are made of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import arch, cdiv, dot_rows, head_tile, job, load_rows, ordered, precision
from .spec import Query, Store

NO_RANK: tl.constexpr = tl.constexpr(-(2**31))  # below every score's, NaN and -inf included


class Scores(NamedTuple):
    """Undefined in slots past a row's `clusters`; slots without members score -inf and rank lowest."""

    scores: Tensor  # [B, G, r, C] float32 scaled logits of the centroids
    ranks: Tensor  # [B, G, C] int32, rising with the reduced share of the softmax; NaN highest
    total: Tensor  # [B, G, r] float32 logsumexp of what was ranked; undefined in a row without clusters


@triton.jit
def cluster_sizes(offsets, o_n, valid):
    return tl.load(offsets + o_n + 1, mask=valid, other=0) - tl.load(offsets + o_n, mask=valid, other=0)


@triton.jit
def score_kernel(
    q, centroids, offsets, clusters, scores, sums, q_b, q_h, slots, scale,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, WEIGHT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of clusters: their scores, and each head's maximum and sum of exponentials over them."""
    i_tile, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_row // KV_HEADS, i_row % KV_HEADS
    count = tl.load(clusters + i_b)
    if i_tile * BLOCK_N >= count:
        return
    o_g, o_n = tl.arange(0, BLOCK_G), i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_g, m_n = o_g < HEADS, o_n < count
    o_q = i_b * q_b + (i_h * HEADS + o_g) * q_h
    centroids += i_row * slots * D
    b_q = load_rows(q, o_q, m_g, D, BLOCK_D, True)
    b_c = load_rows(centroids, o_n * D, m_n, D, BLOCK_D, True)
    b_s = dot_rows(b_q, b_c, q, o_q, m_g, centroids, o_n * D, m_n, D, PRECISION) * scale
    size = cluster_sizes(offsets + i_row * (slots + 1), o_n, m_n)
    b_s = tl.where((size > 0)[None, :], b_s, float("-inf"))
    p_s = scores + (i_row * HEADS + o_g)[:, None] * slots + o_n[None, :]
    tl.store(p_s, b_s, mask=m_g[:, None] & m_n[None, :])
    if WEIGHT:
        b_s += tl.log(tl.maximum(size, 1).to(tl.float32))[None, :]
    b_m = tl.max(b_s, 1)
    b_l = tl.sum(tl.exp(b_s - tl.where(b_m == float("-inf"), 0.0, b_m)[:, None]), 1)
    p_sums = sums + ((i_row * tl.num_programs(0) + i_tile) * HEADS + o_g) * 2
    tl.store(p_sums, b_m, mask=m_g)
    tl.store(p_sums + 1, b_l, mask=m_g)


@triton.jit
def _total(sums, tiles, o_g, HEADS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr):
    """Each head's logsumexp over all tiles, in their order."""
    b_m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_G], tl.float32)
    for t in tl.range(0, tiles, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        valid = (o_t < tiles)[:, None] & (o_g < HEADS)[None, :]
        p_sums = sums + (o_t[:, None] * HEADS + o_g[None, :]) * 2
        b_mt = tl.load(p_sums, mask=valid, other=float("-inf"))
        b_lt = tl.load(p_sums + 1, mask=valid, other=0.0)
        b_new = tl.maximum(b_m, tl.max(b_mt, 0))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_l = b_l * tl.exp(b_m - b_safe) + tl.sum(b_lt * tl.exp(b_mt - b_safe[None, :]), 0)
        b_m = b_new
    return b_m + tl.log(b_l)


@triton.jit
def rank_kernel(
    scores, sums, offsets, clusters, ranks, total, slots, tiles,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, WEIGHT: tl.constexpr, REDUCE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """Shares of the softmax as logarithms, reduced over the heads; SCORED clusters made a tile of `sums`."""
    i_tile, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(clusters + i_row // KV_HEADS)
    if i_tile * BLOCK_N >= count:
        return
    o_g, o_n = tl.arange(0, BLOCK_G), i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_g, m_n = o_g < HEADS, o_n < count
    b_total = _total(sums + i_row * tiles * HEADS * 2, tl.cdiv(count, SCORED), o_g, HEADS, BLOCK_G, BLOCK_T)
    if i_tile == 0:
        tl.store(total + i_row * HEADS + o_g, b_total, mask=m_g)
    mask = m_g[:, None] & m_n[None, :]
    b_x = tl.load(scores + (i_row * HEADS + o_g)[:, None] * slots + o_n[None, :], mask=mask, other=float("-inf"))
    size = cluster_sizes(offsets + i_row * (slots + 1), o_n, m_n)
    if WEIGHT:
        b_x += tl.log(tl.maximum(size, 1).to(tl.float32))[None, :]
    b_x = tl.where(m_g[:, None], b_x - b_total[:, None], float("-inf"))
    b_top = tl.max(b_x, 0)
    if REDUCE == "max":
        b_rank = tl.where(tl.max((b_x != b_x).to(tl.int32), 0) > 0, float("nan"), b_top)
    else:
        b_safe = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_rank = b_safe + tl.log(tl.sum(tl.exp(b_x - b_safe[None, :]), 0))
        if REDUCE == "mean":
            b_rank -= tl.log(tl.full([], HEADS, tl.float32))
    tl.store(ranks + i_row * slots + o_n, tl.where(size > 0, ordered(b_rank), NO_RANK), mask=m_n)


def score(q: Tensor, store: Store, query: Query) -> Scores:
    """Scores and ranks of all clusters for `q [B, Hq, D]`."""
    (batch, hq, dim), (_, kv_heads, slots) = q.shape, store.radius.shape
    heads, rows = hq // kv_heads, batch * kv_heads
    scores = torch.empty(batch, kv_heads, heads, slots, dtype=torch.float32, device=q.device)
    ranks = torch.empty(batch, kv_heads, slots, dtype=torch.int32, device=q.device)
    total = torch.empty(batch, kv_heads, heads, dtype=torch.float32, device=q.device)
    row = configs.get("retroinfer.score", arch(q), dim, q.element_size())
    tiles = cdiv(slots, row["BLOCK_N"])
    sums = torch.empty(rows, tiles, heads, 2, dtype=torch.float32, device=q.device)
    shape = dict(KV_HEADS=kv_heads, HEADS=heads, WEIGHT=query.weight_by_size)
    score_kernel[tiles, rows](
        q, store.centroids, store.offsets, store.clusters, scores, sums, *q.stride()[:2], slots, query.scale,
        **shape, D=dim, BLOCK_D=head_tile(dim), PRECISION=precision(q.dtype), BLOCK_G=head_tile(heads), **row,
    )  # fmt: skip
    launch = configs.get("retroinfer.rank", arch(q), dim, q.element_size())
    rank_kernel[cdiv(slots, launch["BLOCK_N"]), rows](
        scores, sums, store.offsets, store.clusters, ranks, total, slots, tiles,
        **shape, REDUCE=query.reduce, BLOCK_G=triton.next_power_of_2(heads), SCORED=row["BLOCK_N"], **launch,
    )  # fmt: skip
    return Scores(scores, ranks, total)


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `score` launches, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict(q=x, centroids=x, scores="*fp32", sums="*fp32", total="*fp32", scale="fp32")
    types |= dict.fromkeys(("offsets", "clusters", "ranks"), "*i32")
    row = configs.get("retroinfer.score", arch, head_dim, size)
    shape = dict(KV_HEADS=8, HEADS=4, WEIGHT=False)
    dense = dict(D=head_dim, BLOCK_D=head_tile(head_dim), PRECISION="tf32x3" if size == 4 else "tf32", BLOCK_G=16)
    ranked = shape | dict(REDUCE="sum", BLOCK_G=4, SCORED=row["BLOCK_N"])
    launch = configs.get("retroinfer.rank", arch, head_dim, size)
    return [
        job("retroinfer.score", score_kernel, types, shape | dense, row, dot=False),
        job("retroinfer.rank", rank_kernel, types, ranked, launch, dot=False),
    ]
