"""Recomputed keys and values into the slots of a pool, both in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import arch, cdiv, job, load_rows, store_rows


@triton.jit
def scatter_kernel(
    k, v, k_slots, v_slots, slots, tokens, k_b, k_t, k_h, v_b, v_t, v_h, p_n, p_h, r_n, r_h,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, (token, head) pairs."""
    tiles = tl.cdiv(tokens * HEADS, BLOCK_M)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    i_t, i_h = (o_row // HEADS).to(tl.int64), (o_row % HEADS).to(tl.int64)
    i_slot = tl.load(slots + i_b * tokens + i_t, mask=i_t < tokens, other=-1).to(tl.int64)
    m_row = i_slot >= 0
    b_k = load_rows(k, i_b * k_b + i_t * k_t + i_h * k_h, m_row, D, BLOCK_D, True)
    b_v = load_rows(v, i_b * v_b + i_t * v_t + i_h * v_h, m_row, D, BLOCK_D, True)
    store_rows(k_slots, i_slot * p_n + i_h * p_h, m_row, b_k, D, BLOCK_D)
    store_rows(v_slots, i_slot * r_n + i_h * r_h, m_row, b_v, D, BLOCK_D)


def scatter_kv(k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, slots: Tensor) -> None:
    """`k, v [B, T, Hkv, D]` into `k_slots, v_slots [N, Hkv, D]` at `slots [B, T]`; -1 is skipped."""
    batch, tokens, heads, dim = k.shape
    if k.numel() == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    row = configs.get("fusionrag.scatter", arch(k), dim, k.element_size())
    with torch.cuda.device_of(k):
        scatter_kernel[(cdiv(tokens * heads, row["BLOCK_M"]) * batch,)](
            k, v, k_slots, v_slots, slots.contiguous(), tokens, *k.stride()[:3], *v.stride()[:3],
            *k_slots.stride()[:2], *v_slots.stride()[:2], HEADS=heads, D=dim, BLOCK_D=triton.next_power_of_2(dim),
            **row,
        )  # fmt: skip


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `scatter_kv` launches, for `kernels/compile.py`."""
    types = dict.fromkeys(("k", "v", "k_slots", "v_slots"), f"*{dtype}") | {"slots": "*i32"}
    shape = dict(HEADS=8, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim))
    config = configs.get("fusionrag.scatter", arch, head_dim, 4 if dtype == "fp32" else 2)
    return [job("fusionrag.scatter", scatter_kernel, types, shape, config, dot=False)]
