"""Stage 5: one state of all shares, exact ones first and each kind in its order, and a trace of what is not finite."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import LN2, arch, head_tile, job
from .exact import Parts
from .score import Scores
from .spec import Store


@triton.jit
def _gather(
    b_acc, b_m, b_l, acc, sums, i_row, i_g, HEADS: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Add one head's shares, `BLOCK_S` at a time, to its state. What a share without weight holds is not read."""
    o_d = tl.arange(0, BLOCK_D)
    for s in tl.range(0, SPLITS, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        o_part = (i_row * SPLITS + o_s) * HEADS + i_g
        b_ms = tl.load(sums + o_part * 2, mask=o_s < SPLITS, other=float("-inf"))
        b_ls = tl.load(sums + o_part * 2 + 1, mask=o_s < SPLITS, other=0.0)
        mask = (b_ls != 0.0)[:, None] & (o_d < D)[None, :]
        b_x = tl.load(acc + (o_part * D)[:, None] + o_d[None, :], mask=mask, other=0.0)
        b_new = tl.maximum(b_m, tl.max(b_ms, 0))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink, b_w = tl.exp2(b_m - b_safe), tl.exp2(b_ms - b_safe)
        b_acc = b_acc * b_shrink + tl.sum(b_x * b_w[:, None], 0)
        b_l = b_l * b_shrink + tl.sum(b_ls * b_w, 0)
        b_m = b_new
    return b_acc, b_m, b_l


@triton.jit
def merge_kernel(
    acc, sums, guess_acc, guess_sums, total, indexed, out, lse, exact_lse,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr, GUESSES: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per row and query head."""
    i_head = tl.program_id(0).to(tl.int64)
    i_row, i_g = i_head // HEADS, i_head % HEADS
    b_m, b_l = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    b_acc, b_m, b_l = _gather(b_acc, b_m, b_l, acc, sums, i_row, i_g, HEADS, SPLITS, D, BLOCK_D, BLOCK_S)
    tl.store(exact_lse + i_head, tl.where(b_l == 0.0, float("-inf"), (b_m + tl.log2(b_l)) * LN2))
    if GUESSES > 0:
        b_acc, b_m, b_l = _gather(
            b_acc, b_m, b_l, guess_acc, guess_sums, i_row, i_g, HEADS, GUESSES, D, BLOCK_D, BLOCK_S
        )
    # A key that is not finite shows in every head that scored its cluster, read or not.
    scored = tl.load(indexed + i_row // KV_HEADS) > 0
    trace = tl.load(total + i_head, mask=scored, other=0.0) * 0.0
    o_d = tl.arange(0, BLOCK_D)
    b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l) + trace
    tl.store(out + i_head * D + o_d, b_out.to(out.dtype.element_ty), mask=o_d < D)
    tl.store(lse + i_head, tl.where(b_l == 0.0, float("-inf"), (b_m + tl.log2(b_l)) * LN2) + trace)


def merge(
    q: Tensor, exact: Parts, guessed: Parts | None, scored: Scores, store: Store
) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, Hq, D]` in q's dtype, `lse [B, Hq]` float32, and the lse of the exact parts alone."""
    (batch, hq, dim), kv_heads = q.shape, store.k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, exact_lse = (torch.empty(batch, hq, dtype=torch.float32, device=q.device) for _ in range(2))
    merge_kernel[(batch * hq,)](
        *exact, *((None, None) if guessed is None else guessed), scored.total, store.indexed, out, lse, exact_lse,
        KV_HEADS=kv_heads, HEADS=hq // kv_heads, SPLITS=exact.acc.shape[2],
        GUESSES=0 if guessed is None else guessed.acc.shape[2], D=dim, BLOCK_D=head_tile(dim),
        **configs.get("retroinfer.merge", arch(q), dim, 4),
    )  # fmt: skip
    return out, lse, exact_lse


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `merge` launches, for `kernels/compile.py`."""
    types = dict.fromkeys(("acc", "sums", "guess_acc", "guess_sums", "total", "lse", "exact_lse"), "*fp32")
    types |= dict(indexed="*i32", out=f"*{dtype}")
    shape = dict(KV_HEADS=8, HEADS=4, SPLITS=16, GUESSES=16, D=head_dim, BLOCK_D=head_tile(head_dim))
    row = configs.get("retroinfer.merge", arch, head_dim, 4)
    return [job("retroinfer.merge", merge_kernel, types, shape, row, dot=False)]
