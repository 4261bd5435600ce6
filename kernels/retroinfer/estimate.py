"""Stage 4: the estimation zone straight from the meta index, each cluster as if its keys were all their mean.

A cluster's weight is `size * exp(score)` and its value the mean of its values; the scores are those of stage 1.
"""

import torch
import triton
import triton.language as tl

from .. import configs
from ..states.attention import softmax_step
from ..states.tiles import LOG2E, arch, cdiv, head_tile, job, load_rows, precision, shares
from .exact import Parts, store_nothing, store_part
from .score import Scores, cluster_sizes
from .select import FIELDS, Zones
from .spec import Store


@triton.jit
def estimate_kernel(
    scores, value_means, offsets, guessed, counts, acc, sums, slots,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_split, i_row = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS).to(tl.int64)
    count = tl.load(counts + i_row * FIELDS + 2)
    o_g, o_n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N)
    m_g = o_g < HEADS
    tiles = tl.cdiv(count, BLOCK_N).to(tl.int64)
    begin, end = (tiles * i_split // SPLITS).to(tl.int32), (tiles * (i_split + 1) // SPLITS).to(tl.int32)
    i_part = i_row * SPLITS + i_split
    if begin == end:
        store_nothing(sums, i_part, o_g, m_g, HEADS)
        return
    scores += i_row * HEADS * slots
    value_means += i_row * slots * D
    offsets += i_row * (slots + 1)
    guessed += i_row * slots
    b_m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_G], tl.float32)
    b_acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for tile in tl.range(begin, end):
        m_n = tile * BLOCK_N + o_n < count
        slot = tl.load(guessed + tile * BLOCK_N + o_n, mask=m_n, other=0)
        size = cluster_sizes(offsets, slot, m_n)
        b_v = load_rows(value_means, slot * D, m_n, D, BLOCK_D, True)
        mask = m_g[:, None] & m_n[None, :]
        b_s = tl.load(scores + (o_g * slots)[:, None] + slot[None, :], mask=mask, other=float("-inf"))
        b_s = b_s * LOG2E + tl.log2(tl.maximum(size, 1).to(tl.float32))[None, :]
        b_acc, b_m, b_l = softmax_step(b_acc, b_m, b_l, b_s, b_v, 1.0, True, PRECISION)
    store_part(acc, sums, i_part, o_g, m_g, b_acc, b_m, b_l, HEADS, D, BLOCK_D)


def estimate(scored: Scores, store: Store, zones: Zones) -> Parts:
    """The states of the clusters in `zones.guessed`."""
    batch, kv_heads, heads, slots = scored.scores.shape
    dim, rows = store.k.shape[3], batch * kv_heads
    row = configs.get("retroinfer.estimate", arch(store.radius), dim, store.value_means.element_size())
    splits = shares(store.radius, cdiv(slots, row["BLOCK_N"]), rows)
    acc = torch.empty(batch, kv_heads, splits, heads, dim, dtype=torch.float32, device=store.radius.device)
    sums = torch.empty(batch, kv_heads, splits, heads, 2, dtype=torch.float32, device=store.radius.device)
    estimate_kernel[(rows * splits,)](
        scored.scores, store.value_means, store.offsets, zones.guessed, zones.counts, acc, sums, slots, HEADS=heads,
        SPLITS=splits, D=dim, BLOCK_D=head_tile(dim), PRECISION=precision(store.value_means.dtype),
        BLOCK_G=head_tile(heads), **row,
    )  # fmt: skip
    return Parts(acc, sums)


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `estimate` launches, for `kernels/compile.py`."""
    size = 4 if dtype == "fp32" else 2
    types = dict(value_means=f"*{dtype}") | dict.fromkeys(("scores", "acc", "sums"), "*fp32")
    types |= dict.fromkeys(("offsets", "guessed", "counts"), "*i32")
    shape = dict(HEADS=4, SPLITS=16, D=head_dim, BLOCK_D=head_tile(head_dim), BLOCK_G=16)
    shape["PRECISION"] = "tf32x3" if size == 4 else "tf32"
    row = configs.get("retroinfer.estimate", arch, head_dim, size)
    return [job("retroinfer.estimate", estimate_kernel, types, shape, row, dot=False)]
