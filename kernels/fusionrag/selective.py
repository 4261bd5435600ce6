"""Exact causal attention of gathered rows: whole key tiles that every row of a tile sees, then the masked rest.

Rows are taken by rising position, so that the rows of a tile end at about the same key and few key tiles need a mask.
Only speed rests on that order: the bounds of both phases come from the positions a tile holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.attention import softmax_step
from ..states.merge import merge
from ..states.tiles import (
    LN2,
    LOG2E,
    arch,
    cdiv,
    dot_rows,
    head_tile,
    job,
    load_rows,
    precision,
    shares,
    store_rows,
    tile_rows,
)
from .spec import Keys, sort_rows

MOST_S = 256  # requests that a program looks through at a time for its own
FEW = 16  # rows that a request may have on average to be one of few, where keys are read and little else is done


@triton.jit
def find_tile(cu_q, tile, sequences, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """Whose tile number `tile` is, `sequences` or more past the last, and the first row it holds."""
    i_seq, first, passed = 0, 0, 0
    for s in tl.range(0, sequences, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        m_s = o_s < sequences
        b_tokens = tl.load(cu_q + o_s + 1, mask=m_s, other=0) - tl.load(cu_q + o_s, mask=m_s, other=0)
        b_end = passed + tl.cumsum(tl.cdiv(b_tokens * HEADS, BLOCK_M), 0)
        i_seq += tl.sum((b_end <= tile).to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(b_end <= tile, b_end, 0), 0))
        passed = tl.max(b_end, 0)
    return i_seq, (tile - first) * BLOCK_M


@triton.jit
def gathered(order, o_row, m_row, SORTED: tl.constexpr):
    """Where rows lie, int64."""
    i_row = o_row
    if SORTED:
        i_row = tl.load(order + o_row, mask=m_row, other=0)
    return i_row.to(tl.int64)


@triton.jit
def load_pairs(x, o_x, m_x, p, BLOCK_P: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both columns of `BLOCK_P` pairs of rows, from pair `p` on. What is not rotary pairs up in the same way."""
    p_x, m_x = x + o_x[:, None], m_x[:, None]
    if INTERLEAVED:
        o_d = 2 * p + tl.arange(0, 2 * BLOCK_P)
        b_x = tl.load(p_x + o_d[None, :], mask=m_x & (o_d < D)[None, :], other=0.0)
        return tl.split(tl.reshape(b_x, [o_x.shape[0], BLOCK_P, 2]))
    o_a = p + tl.arange(0, BLOCK_P)
    o_b = o_a + ROTARY // 2
    m_a = o_a < (D + 1) // 2
    if ROTARY < D:
        past = o_a >= ROTARY // 2
        o_a += tl.where(past, ROTARY // 2, 0)
        o_b += tl.where(past, (D - ROTARY + 1) // 2, 0)
    b_a = tl.load(p_x + o_a[None, :], mask=m_x & m_a[None, :], other=0.0)
    b_b = tl.load(p_x + o_b[None, :], mask=m_x & (o_b < D)[None, :], other=0.0)
    return b_a, b_b


@triton.jit
def load_turned(
    k, o_k, m_k, cos, sin, o_c, p, BLOCK_P: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """`load_pairs` of keys, turned in float32 and rounded once."""
    b_a, b_b = load_pairs(k, o_k, m_k, p, BLOCK_P, D, ROTARY, INTERLEAVED)
    b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    o_p = p + tl.arange(0, BLOCK_P)
    o_turn, m_turn = o_c[:, None] + o_p[None, :], m_k[:, None] & (o_p < ROTARY // 2)[None, :]
    b_cos = tl.load(cos + o_turn, mask=m_turn, other=1.0)
    b_sin = tl.load(sin + o_turn, mask=m_turn, other=0.0)
    dtype = k.dtype.element_ty
    return (b_a * b_cos - b_b * b_sin).to(dtype), (b_b * b_cos + b_a * b_sin).to(dtype)


@triton.jit
def dot_turned(
    b_a, b_b, q, o_q, m_q, k, o_k, m_k, cos, sin, o_c, BLOCK_P: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`q @ k.T` with keys turned while they are loaded, `BLOCK_P` pairs at a time.

    `b_a, b_b` are the first pairs of q: if there are more, registers do not hold them all, and they are read again.
    """
    if 2 * BLOCK_P < D:
        b_s = tl.zeros([o_q.shape[0], o_k.shape[0]], tl.float32)
        for p in tl.range(0, (D + 1) // 2, BLOCK_P):
            b_qa, b_qb = load_pairs(q, o_q, m_q, p, BLOCK_P, D, ROTARY, INTERLEAVED)
            b_ka, b_kb = load_turned(k, o_k, m_k, cos, sin, o_c, p, BLOCK_P, D, ROTARY, INTERLEAVED)
            b_s = tl.dot(b_qa, tl.trans(b_ka), b_s, input_precision=PRECISION)
            b_s = tl.dot(b_qb, tl.trans(b_kb), b_s, input_precision=PRECISION)
    else:
        b_ka, b_kb = load_turned(k, o_k, m_k, cos, sin, o_c, 0, BLOCK_P, D, ROTARY, INTERLEAVED)
        b_s = tl.dot(b_a, tl.trans(b_ka), input_precision=PRECISION)
        b_s = tl.dot(b_b, tl.trans(b_kb), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _sweep(
    b_acc, b_m, b_l, b_q, b_q2, q, o_q, m_q, k, v, table, cos, sin, k_page, k_t, v_page, v_t, page_size, begin, end,
    b_pos, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, LAYOUT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys `[begin, end)` from the first of a tile on; without MASK they are whole tiles that every row sees."""
    o_n = tl.arange(0, BLOCK_N)
    for n0 in tl.range(begin, end, BLOCK_N):
        valid = n0 + o_n < end
        if LAYOUT == "slots":
            o_j = n0 + o_n
            i_page = tl.load(table + o_j // page_size, mask=valid, other=0).to(tl.int64)
            i_t = (o_j % page_size).to(tl.int64)
            p_k, o_k = k, i_page * k_page + i_t * k_t
            p_v, o_v = v, i_page * v_page + i_t * v_t
        else:
            i_page, i_t = tl.zeros([], tl.int64), tl.zeros([], tl.int64) + n0
            if LAYOUT == "pages":
                i_page, i_t = tl.load(table + n0 // page_size).to(tl.int64), i_t % page_size
            p_k, o_k = k + i_page * k_page + i_t * k_t, o_n * k_t
            p_v, o_v = v + i_page * v_page + i_t * v_t, o_n * v_t
        if ROTARY > 0:
            o_c = (n0 + o_n).to(tl.int64) * (ROTARY // 2)
            b_s = dot_turned(
                b_q, b_q2, q, o_q, m_q, p_k, o_k, valid, cos, sin, o_c, BLOCK_P, D, ROTARY, INTERLEAVED, PRECISION
            )
        else:
            b_k = load_rows(p_k, o_k, valid, D, BLOCK_D, MASK)
            b_s = dot_rows(b_q, b_k, q, o_q, m_q, p_k, o_k, valid, D, PRECISION)
        if MASK:
            b_s = tl.where(n0 + o_n[None, :] <= b_pos[:, None], b_s * scale, float("-inf"))
        b_v = load_rows(p_v, o_v, valid, D, BLOCK_D, MASK)
        b_acc, b_m, b_l = softmax_step(b_acc, b_m, b_l, b_s, b_v, scale, MASK, PRECISION)
    return b_acc, b_m, b_l


@triton.jit
def selective_kernel(
    q, k, v, table, starts, lengths, cos, sin, positions, order, cu_q, out, lse, q_t, q_h, k_page, k_t, k_h, v_page,
    v_t, v_h, width, page_size, kv_heads, sequences, splits, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    LAYOUT: tl.constexpr, SORTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i_split, i_h = tl.program_id(0) % splits, tl.program_id(0) // splits % kv_heads
    # Positions rise along a request: its longest tiles start first.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // (kv_heads * splits)
    i_seq, row = find_tile(cu_q, tile, sequences, HEADS, BLOCK_M, BLOCK_S)
    if i_seq >= sequences:
        return
    start_q = tl.load(cu_q + i_seq)
    o_i, o_h, m_row = tile_rows(row, i_h, tl.load(cu_q + i_seq + 1) - start_q, HEADS, BLOCK_M)
    i_row = gathered(order, start_q + o_i, m_row, SORTED)
    b_pos = tl.minimum(tl.load(positions + i_row, mask=m_row, other=-1), tl.load(lengths + i_seq) - 1)

    # A row without keys takes no part in the bounds: what the first phase gives it is dropped at the end.
    m_q = b_pos >= 0
    last = tl.max(b_pos, 0)
    whole = tl.maximum(tl.min(tl.where(m_q, b_pos, last), 0) + 1, 0) // BLOCK_N
    tiles = tl.cdiv(tl.maximum(last + 1, 0), BLOCK_N).to(tl.int64)
    begin, end = (tiles * i_split // splits).to(tl.int32), (tiles * (i_split + 1) // splits).to(tl.int32)

    o_q = i_row * q_t + o_h.to(tl.int64) * q_h
    if ROTARY > 0:
        b_q, b_q2 = load_pairs(q, o_q, m_q, 0, BLOCK_P, D, ROTARY, INTERLEAVED)
    else:
        b_q = load_rows(q, o_q, m_q, D, BLOCK_D, True)
        b_q2 = b_q
    start = tl.load(starts + i_seq)
    k += i_h.to(tl.int64) * k_h
    v += i_h.to(tl.int64) * v_h
    if LAYOUT == "rows":
        k += start * k_t
        v += start * v_t
    else:
        table += i_seq.to(tl.int64) * width
    if ROTARY > 0:
        cos += start * (ROTARY // 2)
        sin += start * (ROTARY // 2)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale *= LOG2E
    b_acc, b_m, b_l = _sweep(
        b_acc, b_m, b_l, b_q, b_q2, q, o_q, m_q, k, v, table, cos, sin, k_page, k_t, v_page, v_t, page_size,
        begin * BLOCK_N, tl.minimum(whole, end) * BLOCK_N, b_pos, scale,
        D, BLOCK_D, BLOCK_N, BLOCK_P, ROTARY, INTERLEAVED, LAYOUT, False, PRECISION,
    )  # fmt: skip
    b_acc, b_m, b_l = _sweep(
        b_acc, b_m, b_l, b_q, b_q2, q, o_q, m_q, k, v, table, cos, sin, k_page, k_t, v_page, v_t, page_size,
        tl.maximum(begin, whole) * BLOCK_N, tl.minimum(end * BLOCK_N, last + 1), b_pos, scale,
        D, BLOCK_D, BLOCK_N, BLOCK_P, ROTARY, INTERLEAVED, LAYOUT, True, PRECISION,
    )  # fmt: skip

    # Read again, or the addresses of both ends would live in registers through the loops.
    start_q = tl.load(cu_q + i_seq, volatile=True)
    o_i, o_h, m_row = tile_rows(row, i_h, tl.load(cu_q + i_seq + 1) - start_q, HEADS, BLOCK_M)
    i_row = gathered(order, start_q + o_i, m_row, SORTED)
    b_l = tl.where(m_q, b_l, 0.0)
    b_out = tl.where(m_q[:, None], b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None], 0.0)
    o_out = (i_row * (kv_heads * HEADS) + o_h) * splits + i_split
    store_rows(out, o_out * D, m_row, b_out, D, BLOCK_D)
    tl.store(lse + o_out, tl.where(b_l == 0.0, float("-inf"), (b_m + tl.log2(b_l)) * LN2), mask=m_row)


def selective(q: Tensor, keys: Keys, positions: Tensor, cu_q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Rows of `q [Nq, Hq, D]` over keys `0..positions[i]` of their request: `out` in q's dtype, `lse [Nq, Hq]` float32.

    Few rows share their keys among several programs, whose states are merged in order: results repeat bit for bit.
    """
    (nq, hq, d), kv_heads, sequences = q.shape, keys.k.shape[-2], cu_q.numel() - 1
    if nq == 0:
        return torch.empty_like(q), torch.empty(nq, hq, dtype=torch.float32, device=q.device)
    if scale < 0:  # the unmasked phase takes the maximum before it scales
        q, scale = -q, -scale
    heads, layout, page, width, capacity = hq // kv_heads, "rows", 1, 0, keys.k.shape[0]
    name = "selective" if cdiv(nq, sequences) * heads > FEW else "few"
    name = name if keys.cos is None else "turned"
    config = _config(name, arch(q), d, q.element_size(), keys.table is not None)
    if keys.table is not None:
        page, width = keys.k.shape[1], keys.table.stride(0)
        capacity = keys.table.shape[1] * page
        layout = "slots" if page % config["BLOCK_N"] else "pages"
    programs = min(nq * heads // config["BLOCK_M"] + sequences, nq * heads) * kv_heads
    splits = shares(q, cdiv(capacity, config["BLOCK_N"]), programs)
    out = torch.empty(nq * hq, splits, d, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    lse = torch.empty(nq * hq, splits, dtype=torch.float32, device=q.device)
    order = sort_rows(positions, cu_q) if nq > sequences else None
    selective_kernel[(programs * splits,)](
        q, keys.k, keys.v, keys.table, keys.starts, keys.lengths, keys.cos, keys.sin, positions, order, cu_q, out, lse,
        *q.stride()[:2], *_strides(keys.k), *_strides(keys.v), width, page, kv_heads, sequences, splits, scale,
        HEADS=heads, D=d, BLOCK_D=head_tile(d), ROTARY=0 if keys.cos is None else 2 * keys.cos.shape[1],
        INTERLEAVED=keys.interleaved, LAYOUT=layout, SORTED=order is not None, PRECISION=precision(q.dtype),
        BLOCK_S=min(triton.next_power_of_2(sequences), MOST_S), **config,
    )  # fmt: skip
    if splits == 1:
        return out.view(q.shape), lse.view(nq, hq)
    parts = out.transpose(0, 1).view(splits, nq, hq, d), lse.T.view(splits, nq, hq)
    whole = torch.empty_like(q), torch.empty(nq, hq, dtype=torch.float32, device=q.device)
    merge(*parts, None, None, False, *whole, None)
    return whole


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of page, key and head."""
    return (0, *x.stride()[:2]) if x.ndim == 3 else x.stride()[:3]


def _config(name: str, arch: int, head_dim: int, size: int, looked_up: bool) -> dict[str, int]:
    config = configs.get(f"fusionrag.{name}", arch, head_dim, size)
    config["BLOCK_P"] = min(config.get("BLOCK_P", 0), head_tile(cdiv(head_dim, 2)))
    if looked_up:  # the pipeline gives a tile's places in the table as many stages as the tile itself
        config["num_stages"] = 2 * config["num_stages"] - 1
    return config


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `selective` launches, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict.fromkeys(("q", "k", "v", "out"), x) | dict(starts="*i64", scale="fp32")
    types |= dict.fromkeys(("cos", "sin", "lse"), "*fp32")
    types |= dict.fromkeys(("table", "lengths", "positions", "order", "cu_q"), "*i32")
    shape = dict(HEADS=4, D=head_dim, BLOCK_D=head_tile(head_dim), ROTARY=0, INTERLEAVED=False, SORTED=True, BLOCK_S=4)
    shape["PRECISION"] = "tf32x3" if size == 4 else "tf32"
    modes = {
        "rows": ("selective", "rows", {}),
        "pages": ("selective", "pages", {}),
        "slots": ("selective", "slots", {"page_size": 1}),
        "turned": ("turned", "slots", {"ROTARY": head_dim}),
        "interleaved": ("turned", "rows", {"ROTARY": head_dim, "INTERLEAVED": True}),
        "few": ("few", "slots", {"page_size": 1, "SORTED": False}),
    }
    jobs = []
    for mode, (name, layout, more) in modes.items():
        config = _config(name, arch, head_dim, size, layout != "rows")
        made = types | ({"out": "*fp32"} if name == "few" else {})
        constants = shape | {"LAYOUT": layout} | more
        dot = size == 2 and name != "few"
        jobs.append(job(f"fusionrag.selective[{mode}]", selective_kernel, made, constants, config, dot))
    return jobs
