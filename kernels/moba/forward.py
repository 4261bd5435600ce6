"""Stage 4: attention, KV block by KV block for the chosen blocks, then each query's own block and the merge.

`gathered_kernel` gives every (query, head, slot) its own place in a partial `(out, lse)` buffer; `finish_kernel`
attends to the own block, then adds the slots in slot order, so results repeat bit for bit. Scores are in log2 units.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.attention import add_sink, softmax_step
from ..states.tiles import LN2, LOG2E, arch, cut, dot_rows, head_tile, job, load_rows, precision, store_rows
from .spec import Geometry, Slots, Spec


@triton.jit
def gathered_kernel(
    q, k, v, pairs, offsets, owner, first, part, part_lse, cu_k, cu_blocks, block_seq, q_t, q_h, k_t, k_h, v_t, v_h,
    keys, block_size, slots, scale,
    OWN: tl.constexpr, FULL: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`SHARED` heads follow one pair's choice; `FULL`: blocks are whole and a multiple of `BLOCK_N` keys."""
    item = tl.program_id(0)
    key = tl.load(owner + item)
    if key >= keys:
        return
    low = tl.load(offsets + key)
    i = (item - tl.load(first + key)) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_i = i < (tl.load(offsets + key + 1) - low) * SHARED
    pair = tl.load(pairs + low + i // SHARED, mask=m_i, other=0)
    head = (pair // slots) % (HQ // SHARED) * SHARED + i % SHARED
    t = (pair // (slots * (HQ // SHARED))).to(tl.int64)
    o_q = t * q_t + head.to(tl.int64) * q_h
    b_q = load_rows(q, o_q, m_i, D, BLOCK_D, True)

    block, kv_head = key // HKV, (key % HKV).to(tl.int64)
    seq = tl.load(block_seq + block)
    start = tl.load(cu_k + seq) + (block - tl.load(cu_blocks + seq)) * block_size
    length = block_size if FULL else tl.minimum(block_size, tl.load(cu_k + seq + 1) - start)
    k += start.to(tl.int64) * k_t + kv_head * k_h
    v += start.to(tl.int64) * v_t + kv_head * v_h
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    i_n = tl.arange(0, BLOCK_N)
    for n in range(0, length, BLOCK_N):
        m_n = n + i_n < length
        b_k = load_rows(k, i_n * k_t, m_n, D, BLOCK_D, not FULL)
        b_v = load_rows(v, i_n * v_t, m_n, D, BLOCK_D, not FULL)
        s = dot_rows(b_q, b_k, q, o_q, m_i, k, i_n * k_t, m_n, D, PRECISION) * scale
        k += BLOCK_N * k_t
        v += BLOCK_N * v_t
        if not FULL:
            s = tl.where(m_n[None, :], s, -float("inf"))
        acc, m, l = softmax_step(acc, m, l, s, b_v, 1.0, True, PRECISION)

    place = (t * HQ + head) * (slots - OWN) + pair % slots - OWN
    store_rows(part, place * D, m_i, acc / l[:, None], D, BLOCK_D)
    tl.store(part_lse + place, m + tl.log2(l), mask=m_i)


@triton.jit
def finish_kernel(
    q, k, v, sinks, indices, part, part_lse, out, lse, owner, first, cu_q, cu_k, cu_blocks, query_pos, q_t, q_h, k_t,
    k_h, v_t, v_h, num_seqs, block_size, slots, scale,
    CAUSAL: tl.constexpr, SINKS: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, SHARED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    item, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    seq = tl.load(owner + item)
    if seq >= num_seqs:
        return
    row = tl.load(cu_q + seq) + (item - tl.load(first + seq)) * BLOCK_M
    rows = tl.minimum(tl.load(cu_q + seq + 1) - row, BLOCK_M)
    m_t = tl.arange(0, BLOCK_M) < rows
    t = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if CAUSAL:
        at = tl.load(query_pos + row)
        pos = at + tl.arange(0, BLOCK_M)
        own = pos // block_size
        o_q = t * q_t + head * q_h
        b_q = load_rows(q, o_q, m_t, D, BLOCK_D, True)
        low, high = at // block_size * block_size, at + rows
        begin, kv_head = (tl.load(cu_k + seq) + low).to(tl.int64), head // (HQ // HKV)
        k += begin * k_t + kv_head * k_h
        v += begin * v_t + kv_head * v_h
        i_n = tl.arange(0, BLOCK_N)
        for n in range(low, high, BLOCK_N):
            b_k = load_rows(k, i_n * k_t, n + i_n < high, D, BLOCK_D, True)
            b_v = load_rows(v, i_n * v_t, n + i_n < high, D, BLOCK_D, True)
            s = dot_rows(b_q, b_k, q, o_q, m_t, k, i_n * k_t, n + i_n < high, D, PRECISION) * scale
            k += BLOCK_N * k_t
            v += BLOCK_N * v_t
            j = n + i_n[None, :]
            seen = (j <= pos[:, None]) & (j >= (own * block_size)[:, None])
            acc, m, l = softmax_step(acc, m, l, tl.where(seen, s, -float("inf")), b_v, 1.0, True, PRECISION)
        limit = own
    else:
        limit = tl.load(cu_blocks + seq + 1) - tl.load(cu_blocks + seq)

    p_slot = indices + (t * (HQ // SHARED) + head // SHARED) * slots
    place = (t * HQ + head) * (slots - CAUSAL) - CAUSAL
    for slot in range(CAUSAL, slots):
        block = tl.load(p_slot + slot, mask=m_t, other=-1)
        live = (block >= 0) & (block < limit)
        b_lse = tl.load(part_lse + place + slot, mask=live, other=-float("inf"))
        b_out = load_rows(part, (place + slot) * D, live, D, BLOCK_D, True)
        m_new = tl.maximum(m, b_lse)
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha, beta = tl.exp2(m - base), tl.exp2(b_lse - base)
        m, l = m_new, l * alpha + beta
        acc = acc * alpha[:, None] + b_out.to(tl.float32) * beta[:, None]

    if SINKS:
        acc, m, l = add_sink(acc, m, l, tl.load(sinks + head))
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    store_rows(out, (t * HQ + head) * D, m_t, acc, D, BLOCK_D)
    tl.store(lse + t * HQ + head, (m + tl.log2(l)) * LN2, mask=m_t)


def gathered(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, offsets: Tensor, geo: Geometry, spec: Spec, nslots: Slots
) -> tuple[Tensor, Tensor]:
    """Attention of every listed pair to its block: `part [Nq, Hq, slots but own, D]`, its lse float32 in log2 units.

    `q` and `geo` are those of the segment `pairs` was laid out for. Places no pair names are left unwritten.
    """
    (nq, hq, dim), hkv, places = q.shape, k.shape[1], nslots.total - nslots.own
    part = torch.empty(nq, hq, places, dim, dtype=q.dtype, device=q.device)
    part_lse = torch.empty(nq, hq, places, dtype=torch.float32, device=q.device)
    keys = offsets.numel() - 1
    if part_lse.numel() and keys:
        row = configs.get("moba.gathered", arch(q), dim, q.element_size())
        shared = hq // hkv if spec.group else 1
        owner, first = cut(offsets.diff() * shared, nq * hq * places, row["BLOCK_M"])
        gathered_kernel[owner.numel(),](
            q, k, v, pairs, offsets, owner, first, part, part_lse, geo.cu_k, geo.cu_blocks, geo.block_seq,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            keys, spec.block_size, nslots.total, spec.scale * LOG2E.value,
            OWN=nslots.own, FULL=spec.causal and spec.block_size % row["BLOCK_N"] == 0, HQ=hq, HKV=hkv, SHARED=shared,
            D=dim, BLOCK_D=head_tile(dim), PRECISION=precision(q.dtype), **row,
        )  # fmt: skip
    return part, part_lse


def finish(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, indices: Tensor, part: Tensor, part_lse: Tensor, out: Tensor,
    lse: Tensor, geo: Geometry, spec: Spec, nslots: Slots,
) -> None:  # fmt: skip
    """Write `out` and `lse` of a segment: own blocks, sinks, and the partial results `gathered` left."""
    (nq, hq, dim), hkv = q.shape, k.shape[1]
    if not out.numel():
        return
    row = configs.get("moba.finish", arch(q), dim, q.element_size())
    owner, first = cut(geo.cu_q.diff(), nq, row["BLOCK_M"])
    finish_kernel[owner.numel(), hq](
        q, k, v, sinks, indices, part, part_lse, out, lse, owner, first, geo.cu_q, geo.cu_k, geo.cu_blocks,
        geo.query_pos, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        geo.cu_q.numel() - 1, spec.block_size, nslots.total, spec.scale * LOG2E.value,
        CAUSAL=spec.causal, SINKS=sinks is not None, HQ=hq, HKV=hkv, SHARED=hq // indices.shape[1],
        D=dim, BLOCK_D=head_tile(dim), PRECISION=precision(q.dtype), **row,
    )  # fmt: skip


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `gathered` and `finish` launch, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict.fromkeys(("q", "k", "v", "part", "out"), x) | {"scale": "fp32"}
    types |= dict.fromkeys(("sinks", "part_lse", "lse"), "*fp32")
    types |= dict.fromkeys(("pairs", "offsets", "owner", "first", "indices"), "*i32")
    types |= dict.fromkeys(("cu_q", "cu_k", "cu_blocks", "block_seq", "query_pos"), "*i32")
    shape = {"HQ": 32, "HKV": 8, "D": head_dim, "BLOCK_D": head_tile(head_dim)}
    shape["PRECISION"] = "tf32x3" if size == 4 else "tf32"
    stages = (
        ("gathered", gathered_kernel, {"OWN": 1, "FULL": True, "SHARED": 1}),
        ("gathered,group", gathered_kernel, {"OWN": 1, "FULL": False, "SHARED": 4}),
        ("finish", finish_kernel, {"CAUSAL": True, "SINKS": True, "SHARED": 1}),
    )
    return [
        job(f"moba.forward[{name}]", fn, types, shape | extra,
            configs.get(f"moba.{name.partition(',')[0]}", arch, head_dim, size), dot=size == 2)
        for name, fn, extra in stages
    ]  # fmt: skip
