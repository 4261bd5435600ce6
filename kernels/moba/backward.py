"""Stage 5: gradients of MoBA attention without atomics, so results repeat bit for bit.

`dkv_kernel` owns a tile of keys of one block and walks the queries that live in the block, then those that chose it.
`dq_kernel` mirrors the forward's gathered kernel and gives every (query, head, slot) its own partial dQ;
`dq_finish_kernel` adds the own block and the slots in slot order. P is recomputed from the merged lse.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.gradients import dkv_step, dq_step, preprocess
from ..states.tiles import arch, cdiv, cut, head_tile, job, load_lse, load_rows, precision, store_rows, tile_rows
from .layout import layout as triton_layout
from .layout import segment
from .spec import Geometry, Slots, Spec

MAX_PAIRS = 2**31 - 1  # pairs of a list are numbered in int32

__all__ = ["backward_stages", "preprocess", "production"]


@triton.jit
def _chosen(pairs, base, o_row, m_row, slots, route_heads, SHARED: tl.constexpr):
    """Query, query head and slot of rows of a key's pair list, SHARED heads to a pair."""
    pair = tl.load(pairs + base + o_row // SHARED, mask=m_row, other=0)
    o_head = pair // slots % route_heads * SHARED + o_row % SHARED
    return (pair // (slots * route_heads)).to(tl.int64), o_head, pair % slots


@triton.jit
def _block_span(block, cu_blocks, block_seq, cu_k, sequences, block_size):
    """Sequence of a global block, its number there, and how many keys it has (0 past the last block)."""
    i_seq = tl.load(block_seq + block)
    live = i_seq < sequences
    i_block = block - tl.load(cu_blocks + i_seq, mask=live, other=0)
    len_k = tl.load(cu_k + i_seq + 1, mask=live, other=0) - tl.load(cu_k + i_seq, mask=live, other=0)
    return i_seq, i_block, tl.where(live, tl.minimum(len_k - i_block * block_size, block_size), 0)


@triton.jit
def dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, pairs, offsets, cu_q, cu_k, cu_blocks, block_seq, q_t, q_h, k_t, k_h, v_t, v_h,
    g_t, g_h, kv_heads, route_heads, sequences, slots, q_start, block_size, scale,
    OWN: tl.constexpr, PAIRS: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """HEADS query heads share a KV head, SHARED of them a choice; ADD continues what earlier launches summed."""
    i_h, tiles = tl.program_id(0) % kv_heads, tl.cdiv(block_size, BLOCK_N)
    block = tl.program_id(0) // kv_heads // tiles
    n0 = tl.program_id(0) // kv_heads % tiles * BLOCK_N
    i_seq, i_block, length = _block_span(block, cu_blocks, block_seq, cu_k, sequences, block_size)
    if n0 >= length:
        return
    heads = kv_heads * HEADS
    o_n = n0 + tl.arange(0, BLOCK_N)
    start = tl.load(cu_k + i_seq).to(tl.int64) + i_block * block_size
    b_k = load_rows(k + start * k_t + i_h * k_h, o_n.to(tl.int64) * k_t, o_n < length, D, BLOCK_D, True)
    b_v = load_rows(v + start * v_t + i_h * v_h, o_n.to(tl.int64) * v_t, o_n < length, D, BLOCK_D, True)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    if OWN:
        start_q = tl.load(cu_q + i_seq)
        len_q = tl.load(cu_q + i_seq + 1) - start_q
        # Index, among the sequence's queries, of the one at the block's first key.
        first = i_block * block_size - (tl.load(cu_k + i_seq + 1) - tl.load(cu_k + i_seq) - len_q)
        begin, end = tl.maximum(first + n0, 0), tl.minimum(first + block_size, len_q)
        for row in tl.range(begin * HEADS, end * HEADS, BLOCK_M):
            o_row = row + tl.arange(0, BLOCK_M)
            o_i, o_h, m_row = o_row // HEADS, i_h * HEADS + o_row % HEADS, o_row < end * HEADS
            o_t = (start_q + o_i).to(tl.int64)
            seen = m_row[None, :] & (o_n[:, None] <= (o_i - first)[None, :])
            b_dk, b_dv = dkv_step(
                b_dk, b_dv, b_k, b_v, q, dout, lse, delta, o_t * q_t + o_h * q_h, o_t * g_t + o_h * g_h,
                o_t * heads + o_h, m_row, seen, scale, D, BLOCK_D, True, PRECISION,
            )  # fmt: skip
    if PAIRS:
        base = tl.load(offsets + block * kv_heads + i_h)
        count = (tl.load(offsets + block * kv_heads + i_h + 1) - base) * SHARED
        for row in tl.range(0, count, BLOCK_M):
            o_row = row + tl.arange(0, BLOCK_M)
            m_row = o_row < count
            o_t, o_h, _ = _chosen(pairs, base, o_row, m_row, slots, route_heads, SHARED)
            o_t += q_start
            b_dk, b_dv = dkv_step(
                b_dk, b_dv, b_k, b_v, q, dout, lse, delta, o_t * q_t + o_h * q_h, o_t * g_t + o_h * g_h,
                o_t * heads + o_h, m_row, m_row[None, :], scale, D, BLOCK_D, False, PRECISION,
            )  # fmt: skip

    # Read again, or the addresses of both ends would live in registers through the loops.
    start = tl.load(cu_k + i_seq, volatile=True).to(tl.int64) + i_block * block_size
    o_n = n0 + tl.arange(0, BLOCK_N)
    o_out = ((start + o_n) * kv_heads + i_h) * D
    b_dk *= scale
    if ADD:
        b_dk += load_rows(dk, o_out, o_n < length, D, BLOCK_D, True)
        b_dv += load_rows(dv, o_out, o_n < length, D, BLOCK_D, True)
    store_rows(dk, o_out, o_n < length, b_dk, D, BLOCK_D)
    store_rows(dv, o_out, o_n < length, b_dv, D, BLOCK_D)


@triton.jit
def dq_kernel(
    q, k, v, dout, lse, delta, part, pairs, offsets, owner, first_tile, cu_k, cu_blocks, block_seq, q_t, q_h, k_t,
    k_h, v_t, v_h, g_t, g_h, kv_heads, route_heads, keys, sequences, slots, block_size, scale,
    OWN: tl.constexpr, WHOLE: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of one key's pair list. WHOLE: every listed block is a whole number of key tiles."""
    item = tl.program_id(0)
    key = tl.load(owner + item)
    if key >= keys:
        return
    i_seq, i_block, length = _block_span(key // kv_heads, cu_blocks, block_seq, cu_k, sequences, block_size)
    base = tl.load(offsets + key)
    count = (tl.load(offsets + key + 1) - base) * SHARED
    o_row = (item - tl.load(first_tile + key)) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < count
    heads = route_heads * SHARED
    o_t, o_h, _ = _chosen(pairs, base, o_row, m_row, slots, route_heads, SHARED)
    b_q = load_rows(q, o_t * q_t + o_h * q_h, m_row, D, BLOCK_D, True)
    b_dout = load_rows(dout, o_t * g_t + o_h * g_h, m_row, D, BLOCK_D, True)
    b_lse = load_lse(lse, o_t * heads + o_h, m_row)
    b_delta = tl.load(delta + o_t * heads + o_h, mask=m_row, other=0.0)

    start = tl.load(cu_k + i_seq).to(tl.int64) + i_block * block_size
    k += start * k_t + key % kv_heads * k_h
    v += start * v_t + key % kv_heads * v_h
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    for n0 in tl.range(0, length, BLOCK_N):
        m_key = n0 + o_n < length
        b_dq = dq_step(
            b_dq, b_q, b_dout, b_lse, b_delta, k + n0 * k_t.to(tl.int64), v + n0 * v_t.to(tl.int64), o_n * k_t,
            o_n * v_t, m_key, m_key[None, :], scale, D, BLOCK_D, not WHOLE, PRECISION,
        )  # fmt: skip

    # Read again, or the addresses of both ends would live in registers through the loop.
    o_row = (item - tl.load(first_tile + key, volatile=True)) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < count
    o_t, o_h, o_slot = _chosen(pairs, base, o_row, m_row, slots, route_heads, SHARED)
    o_out = ((o_t * heads + o_h) * (slots - OWN) + o_slot - OWN) * D
    store_rows(part, o_out, m_row, b_dq * scale, D, BLOCK_D)


@triton.jit
def dq_finish_kernel(
    q, k, v, dout, lse, delta, part, indices, dq, owner, first_tile, cu_q, cu_k, cu_blocks, query_pos, q_t, q_h, k_t,
    k_h, v_t, v_h, g_t, g_h, kv_heads, sequences, slots, block_size, scale,
    OWN: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_tile, i_h = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    i_seq = tl.load(owner + i_tile)
    if i_seq >= sequences:
        return
    start_q = tl.load(cu_q + i_seq).to(tl.int64)
    len_q = (tl.load(cu_q + i_seq + 1) - start_q).to(tl.int32)
    row = (i_tile - tl.load(first_tile + i_seq)) * BLOCK_M
    heads = kv_heads * HEADS
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if OWN:
        start_k = tl.load(cu_k + i_seq).to(tl.int64)
        len_k = (tl.load(cu_k + i_seq + 1) - start_k).to(tl.int32)
        o_i, o_h, m_row = tile_rows(row, i_h, len_q, HEADS, BLOCK_M)
        o_t = start_q + o_i
        b_q = load_rows(q, o_t * q_t + o_h * q_h, m_row, D, BLOCK_D, True)
        b_dout = load_rows(dout, o_t * g_t + o_h * g_h, m_row, D, BLOCK_D, True)
        b_lse = load_lse(lse, o_t * heads + o_h, m_row)
        b_delta = tl.load(delta + o_t * heads + o_h, mask=m_row, other=0.0)
        b_pos = tl.load(query_pos + o_t, mask=m_row, other=0)
        b_first = b_pos // block_size * block_size
        k += start_k * k_t + i_h * k_h
        v += start_k * v_t + i_h * v_h
        o_n = tl.arange(0, BLOCK_N)
        begin = tl.min(tl.where(m_row, b_first, len_k), 0)
        end = tl.max(tl.where(m_row, b_pos + 1, 0), 0)
        for n0 in tl.range(begin, end, BLOCK_N):
            o_k = n0 + o_n[None, :]
            seen = (o_k <= b_pos[:, None]) & (o_k >= b_first[:, None])
            b_dq = dq_step(
                b_dq, b_q, b_dout, b_lse, b_delta, k + n0 * k_t.to(tl.int64), v + n0 * v_t.to(tl.int64), o_n * k_t,
                o_n * v_t, n0 + o_n < len_k, seen, scale, D, BLOCK_D, True, PRECISION,
            )  # fmt: skip

    # Read again, or the addresses of both ends would live in registers through the loop.
    row = (i_tile - tl.load(first_tile + i_seq, volatile=True)) * BLOCK_M
    o_i, o_h, m_row = tile_rows(row, i_h, len_q, HEADS, BLOCK_M)
    o_t = start_q + o_i
    if OWN:
        b_limit = tl.load(query_pos + o_t, mask=m_row, other=0) // block_size
    else:
        b_limit = tl.zeros([BLOCK_M], tl.int32) + tl.load(cu_blocks + i_seq + 1) - tl.load(cu_blocks + i_seq)
    p_index = indices + (o_t * (heads // SHARED) + o_h // SHARED) * slots
    b_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in tl.range(OWN, slots):
        b_index = tl.load(p_index + slot, mask=m_row, other=-1)
        chosen = (b_index >= 0) & (b_index < b_limit)
        o_part = (o_t * heads + o_h) * (slots - OWN) + slot - OWN
        b_sum += load_rows(part, o_part * D, chosen, D, BLOCK_D, True).to(tl.float32)
    store_rows(dq, (o_t * heads + o_h) * D, m_row, b_dq * scale + b_sum, D, BLOCK_D)


def _tiles(name: str, q: Tensor, block_size: int) -> dict[str, int]:
    """Small blocks get key tiles to match."""
    row = configs.get(name, arch(q), q.shape[2], q.element_size())
    return row | {"BLOCK_N": min(row["BLOCK_N"], head_tile(block_size))}


def _shape(q: Tensor, hr: int) -> dict:
    """Constants every kernel of a call has in common."""
    return dict(SHARED=q.shape[1] // hr, D=q.shape[2], BLOCK_D=head_tile(q.shape[2]), PRECISION=precision(q.dtype))


def _dkv(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, indices: Tensor, geo: Geometry,
    spec: Spec, nslots: Slots, listed: Callable[[int, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One pair list for all queries; when int32 cannot number it, several, summed in float32 buffers."""
    (nq, hq, _), kv_heads, hr = q.shape, k.shape[1], indices.shape[1]
    step = max(1, MAX_PAIRS // (hq * nslots.total))
    several = nq > step
    dk, dv = (torch.empty(x.shape, dtype=torch.float32 if several else x.dtype, device=x.device) for x in (k, v))
    tiles = _tiles("moba.dkv", q, spec.block_size)
    grid = (geo.num_blocks * cdiv(spec.block_size, tiles["BLOCK_N"]) * kv_heads,)
    for start in range(0, max(nq, 1), step):
        pairs, offsets = listed(start, min(start + step, nq))
        if grid[0]:
            dkv_kernel[grid](
                q, k, v, dout, lse, delta, dk, dv, pairs, offsets, geo.cu_q, geo.cu_k, geo.cu_blocks, geo.block_seq,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2],
                kv_heads, hr, geo.cu_q.numel() - 1, nslots.total, start, spec.block_size, spec.scale,
                OWN=nslots.own == 1 and start == 0, PAIRS=nslots.total > nslots.own, ADD=start > 0,
                HEADS=hq // kv_heads, **_shape(q, hr), **tiles,
            )  # fmt: skip
    return dk.to(k.dtype), dv.to(v.dtype)


def _dq(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, indices: Tensor, geo: Geometry,
    spec: Spec, nslots: Slots, pairs: Tensor, offsets: Tensor, dq: Tensor,
) -> None:  # fmt: skip
    """Write `dq` of a segment: `q`, `dout`, `delta`, `lse`, `indices` and `geo` are its rows, `pairs` its list."""
    (nq, hq, d), (_, kv_heads, _), hr = q.shape, k.shape, indices.shape[1]
    places, keys, sequences = nslots.total - nslots.own, offsets.numel() - 1, geo.cu_q.numel() - 1
    part = torch.empty(nq, hq, places, d, dtype=q.dtype, device=q.device)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    shape = _shape(q, hr)
    if places and keys:
        tiles = _tiles("moba.dq", q, spec.block_size)
        owner, first = cut(offsets.diff() * shape["SHARED"], nq * hq * places, tiles["BLOCK_M"])
        dq_kernel[(owner.numel(),)](
            q, k, v, dout, lse, delta, part, pairs, offsets, owner, first, geo.cu_k, geo.cu_blocks, geo.block_seq,
            *strides, kv_heads, hr, keys, sequences, nslots.total, spec.block_size, spec.scale,
            OWN=nslots.own, WHOLE=spec.causal and spec.block_size % tiles["BLOCK_N"] == 0, **shape, **tiles,
        )  # fmt: skip
    tiles, heads = _tiles("moba.dq_finish", q, spec.block_size), hq // kv_heads
    owner, first = cut(geo.cu_q.diff() * heads, nq * heads, tiles["BLOCK_M"])
    dq_finish_kernel[(owner.numel() * kv_heads,)](
        q, k, v, dout, lse, delta, part, indices, dq, owner, first, geo.cu_q, geo.cu_k, geo.cu_blocks, geo.query_pos,
        *strides, kv_heads, sequences, nslots.total, spec.block_size, spec.scale,
        OWN=nslots.own, HEADS=heads, **shape, **tiles,
    )  # fmt: skip


def backward_stages(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, indices: Tensor, geo: Geometry,
    spec: Spec, nslots: Slots, layout: Callable[..., tuple[Tensor, Tensor]] = triton_layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`dq, dk, dv` in the shapes of `q [Nq, Hq, D]` and `k, v [Nk, Hkv, D]`; `delta` comes from `preprocess`.

    Partial dQ and its pair list are kept within `spec.workspace_bytes` by walking the queries in segments; dK and dV
    read one list of all queries, 4 bytes for each of their slots.
    """
    (nq, hq, d), (_, kv_heads, _) = q.shape, k.shape
    hr, places = indices.shape[1], nslots.total - nslots.own
    indices, lse = indices.contiguous(), lse.contiguous()

    def listed(start: int, end: int) -> tuple[Tensor, Tensor]:
        if places:
            return layout(indices, geo, spec, kv_heads, start, end)
        return indices.new_empty(0), indices.new_zeros(1)

    rows = (dout, delta, q)
    dk, dv = _dkv(*rows, k, v, lse, indices, geo, spec, nslots, listed)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    each = hq * places * d * q.element_size() + 4 * hr * nslots.total
    step = max(1, min(spec.workspace_bytes // each, MAX_PAIRS // (hq * nslots.total))) if places else max(nq, 1)
    for start in range(0, nq, step):
        end = min(start + step, nq)
        part = [x[start:end] for x in rows]
        _dq(
            *part, k, v, lse[start:end], indices[start:end], segment(geo, start, end), spec, nslots,
            *listed(start, end), dq[start:end],
        )  # fmt: skip
    return dq, dk, dv


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `backward_stages` launches, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict.fromkeys(("q", "k", "v", "dout", "part", "dq", "dk", "dv"), x) | {"scale": "fp32"}
    types |= dict.fromkeys(("lse", "delta"), "*fp32")
    types |= dict.fromkeys(("pairs", "offsets", "owner", "first_tile", "indices"), "*i32")
    types |= dict.fromkeys(("cu_q", "cu_k", "cu_blocks", "block_seq", "query_pos"), "*i32")
    shape = dict(D=head_dim, BLOCK_D=head_tile(head_dim), PRECISION="tf32x3" if size == 4 else "tf32")
    modes = {
        "dkv": (dkv_kernel, dict(OWN=True, PAIRS=True, ADD=False, HEADS=4)),
        "dq": (dq_kernel, dict(OWN=1, WHOLE=True)),
        "dq_finish": (dq_finish_kernel, dict(OWN=1, HEADS=4)),
    }
    return [
        job(f"moba.{name}[{route}]", fn, types, shape | extra | dict(SHARED=shared),
            configs.get(f"moba.{name}", arch, head_dim, size), dot=size == 2)
        for name, (fn, extra) in modes.items()
        for route, shared in (("head", 1), ("group", 4))
    ]  # fmt: skip
