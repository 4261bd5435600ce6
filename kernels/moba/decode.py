"""One decoding step in one launch: gate over block sums, split attention over the chosen blocks, merge.

A program serves one query, one routing head and one share of the chosen keys. Each program runs the gate for itself,
as far as its share reaches, so none waits for another; the last one to finish merges the shares in their order and
resets the counter they all count on. Shapes alone decide the launch: no host read, safe under graph capture.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.attention import add_sink, softmax_step
from ..states.tiles import LN2, LOG2E, arch, cdiv, dot_rows, head_tile, job, load_rows, precision, shares, store_rows
from .spec import Slots, Spec

ROUND = 32  # blocks chosen per pass over the sums
_counters: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def _rank(b_score, b_block, candidate):
    """Unique int64 keys: the score's order, then the lowest block. NaN is highest, -0 ties with 0, none is -1."""
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_score == b_score, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FC00000)
    # Shifted up by 2**31, so that every key is positive and -1 can stand for none.
    b_order = b_bits.to(tl.int64) + 2147483648
    return tl.where(candidate, (b_order << 31) | (0x7FFFFFFF - b_block).to(tl.int64), -1)


@triton.jit
def _best(
    b_q, sums, s_n, first, end, below, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """The K highest keys under `below` among blocks [first, end), highest first."""
    b_best = tl.full([K], -1, tl.int64)
    for n0 in tl.range(first, end, TILE):
        o_n = n0 + tl.arange(0, TILE)
        b_sum = load_rows(sums, o_n.to(tl.int64) * s_n, o_n < end, D, BLOCK_D, True)
        b_key = _rank(tl.sum(b_sum * b_q[None, :], 1), o_n, o_n < end)
        b_key = tl.topk(tl.where(b_key < below, b_key, -1), K)
        # The larger of a falling and a rising list, place by place, holds the K largest of both.
        b_best = tl.sort(tl.maximum(b_best, tl.flip(b_key, 0)), descending=True)
    return b_best


@triton.jit
def _attend(
    b_acc, b_m, b_l, b_q, q, o_q, m_g, k, v, table, p_index, block, tile, k_page, k_t, v_page, v_t, page_size,
    block_size, start, length, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys of the block a slot names, through the row's page table; the first tile notes the block."""
    if tile == 0:
        tl.store(p_index, block)
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = (o_n < block_size) & (block * block_size + o_n < length)
    if (block >= 0) & (block * block_size + tile * BLOCK_N < length):
        o_slot = start + block * block_size + o_n
        i_page = tl.load(table + o_slot // page_size, mask=m_n, other=0).to(tl.int64)
        i_t = (o_slot % page_size).to(tl.int64)
        o_k = i_page * k_page + i_t * k_t
        b_k = load_rows(k, o_k, m_n, D, BLOCK_D, True)
        b_v = load_rows(v, i_page * v_page + i_t * v_t, m_n, D, BLOCK_D, True)
        b_s = dot_rows(b_q, b_k, q, o_q, m_g, k, o_k, m_n, D, PRECISION) * (scale * LOG2E)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_acc, b_m, b_l = softmax_step(b_acc, b_m, b_l, b_s, b_v, 1.0, True, PRECISION)
    return b_acc, b_m, b_l


@triton.jit
def decode_kernel(
    q, k, v, table, sums, rows, lengths, starts, sinks, out, lse, indices, part, part_lse, counter, q_r, q_h, k_page,
    k_t, k_h, v_page, v_t, v_h, p_r, s_r, s_n, s_h, page_size, block_size, sink, local, picks, scale,
    STARTS: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, ROUTES: tl.constexpr,
    SPLITS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """HEADS query heads share a KV head, SHARED of them (BLOCK_G rows) a choice; BLOCK_M sums are scored at once."""
    i_split, i_route = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS % ROUTES
    i_r = (tl.program_id(0) // SPLITS // ROUTES).to(tl.int64)
    i_kv = i_route * SHARED // HEADS
    length = tl.load(lengths + i_r)
    i_row = tl.load(rows + i_r).to(tl.int64)
    start = 0
    if STARTS:
        start = tl.load(starts + i_row)
    table += i_row * p_r
    k += i_kv.to(tl.int64) * k_h
    v += i_kv.to(tl.int64) * v_h
    sums += i_row * s_r + i_kv * s_h
    o_g = tl.arange(0, BLOCK_G)
    o_h, m_g = i_route * SHARED + o_g, o_g < SHARED
    o_q = i_r * q_r + o_h * q_h
    b_q = load_rows(q, o_q, m_g, D, BLOCK_D, True)
    b_gate = tl.sum(b_q.to(tl.float32), 0) / block_size

    # Slots in the order of spec.py: own, sink blocks, local blocks, picks. A share is a run of (slot, key tile) units.
    own = tl.where(length > 0, (length - 1) // block_size, -1)
    ruled = 1 + sink + local
    tiles = tl.cdiv(block_size, BLOCK_N)
    units = (ruled + picks) * tiles
    begin = (units.to(tl.int64) * i_split // SPLITS).to(tl.int32)
    end = (units.to(tl.int64) * (i_split + 1) // SPLITS).to(tl.int32)
    p_indices = indices + (i_r * ROUTES + i_route) * (ruled + picks)

    b_m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_G], tl.float32)
    b_acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for unit in tl.range(begin, tl.minimum(end, ruled * tiles)):
        slot, tile = unit // tiles, unit % tiles
        recent = own - (slot - sink)
        block = tl.where(slot <= sink, tl.where(slot <= own, slot - 1, -1), tl.where(recent >= sink, recent, -1))
        block = tl.where(slot == 0, own, block)
        b_acc, b_m, b_l = _attend(
            b_acc, b_m, b_l, b_q, q, o_q, m_g, k, v, table, p_indices + slot, block, tile, k_page, k_t, v_page, v_t,
            page_size, block_size, start, length, scale, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip

    below = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    o_k = tl.arange(0, K)
    # Rounds whose slots come before the share only move `below`.
    for pick in tl.range(0, tl.minimum(tl.maximum(tl.cdiv(end, tiles) - ruled, 0), picks), K):
        b_best = _best(b_gate, sums, s_n, sink, own - local, below, D, BLOCK_D, BLOCK_M, K)
        below = tl.min(b_best, 0)
        b_block = tl.where(b_best >= 0, 0x7FFFFFFF - (b_best & 0x7FFFFFFF), -1).to(tl.int32)
        first_unit = (ruled + pick) * tiles
        last_unit = (ruled + tl.minimum(pick + K, picks)) * tiles
        for unit in tl.range(tl.maximum(begin, first_unit), tl.minimum(end, last_unit)):
            slot, tile = unit // tiles, unit % tiles
            block = tl.sum(tl.where(o_k == slot - ruled - pick, b_block, 0), 0)
            b_acc, b_m, b_l = _attend(
                b_acc, b_m, b_l, b_q, q, o_q, m_g, k, v, table, p_indices + slot, block, tile, k_page, k_t, v_page,
                v_t, page_size, block_size, start, length, scale, D, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip

    o_out = (i_r * ROUTES + i_route) * SHARED + o_g
    if SPLITS > 1:
        o_part = ((i_r * ROUTES + i_route) * SPLITS + i_split) * SHARED + o_g
        store_rows(part, o_part * D, m_g, b_acc, D, BLOCK_D)
        tl.store(part_lse + o_part * 2, b_m, mask=m_g)
        tl.store(part_lse + o_part * 2 + 1, b_l, mask=m_g)
        tl.debug_barrier()  # the whole program has written before one thread of it counts it in
        ticket = tl.atomic_add(counter + i_r * ROUTES + i_route, 1, sem="acq_rel")
        if ticket < SPLITS - 1:
            return
        tl.store(counter + i_r * ROUTES + i_route, 0)
        b_m, b_l, b_acc = _merged(part, part_lse, o_out - o_g, o_g, m_g, SHARED, SPLITS, D, BLOCK_D, BLOCK_G)
    if SINKS:
        b_acc, b_m, b_l = add_sink(b_acc, b_m, b_l, tl.load(sinks + o_h, mask=m_g, other=0.0))
    store_rows(out, o_out * D, m_g, b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None], D, BLOCK_D)
    tl.store(lse + o_out, tl.where(b_l == 0.0, float("-inf"), (b_m + tl.log2(b_l)) * LN2), mask=m_g)


@triton.jit
def _merged(
    part,
    part_lse,
    o_base,
    o_g,
    m_g,
    SHARED: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """All shares in order, past L1: other programs wrote them while this one ran."""
    b_m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_G], tl.float32)
    b_acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    o_d = tl.arange(0, BLOCK_D)
    for i in tl.range(0, SPLITS):
        o_part = o_base * SPLITS + i * SHARED + o_g
        b_m_i = tl.load(part_lse + o_part * 2, mask=m_g, other=float("-inf"), cache_modifier=".cg")
        b_l_i = tl.load(part_lse + o_part * 2 + 1, mask=m_g, other=0.0, cache_modifier=".cg")
        mask = m_g[:, None] & (o_d < D)[None, :]
        b_i = tl.load(part + o_part[:, None] * D + o_d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        b_new = tl.maximum(b_m, b_m_i)
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink, b_w = tl.exp2(b_m - b_safe), tl.exp2(b_m_i - b_safe)
        b_acc = b_acc * b_shrink[:, None] + b_i * b_w[:, None]
        b_l = b_l * b_shrink + b_l_i * b_w
        b_m = b_new
    return b_m, b_l, b_acc


def _zeros(device: torch.device, n: int) -> Tensor:
    """Counters that the kernel leaves at zero. A captured graph has its own: eager calls must not share its memory."""
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters or _counters[key].numel() < n:
        _counters[key] = torch.zeros(max(n, 1024), dtype=torch.int32, device=device)
    return _counters[key]


def decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, sums: Tensor, rows: Tensor, lengths: Tensor,
    starts: Tensor | None, sinks: Tensor | None, spec: Spec, nslots: Slots,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query `r` of `q [R, Hq, D]` against keys `0..lengths[r]-1` of cache row `rows[r]`.

    `k_pages, v_pages [pages, page, Hkv, D]`, `table [Bc, P]`: token `t` lies at slot `starts[row] + t` of its row.
    `sums [Bc, blocks, Hkv, D]` float32 are the blocks' summed keys. Returns `out`, `lse [R, Hq]` and `indices
    [R, Hr, slots]` int32.
    """
    (r, hq, d), (_, page_size, kv_heads, _) = q.shape, k_pages.shape
    routes = kv_heads if spec.group else hq
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(r, hq, dtype=torch.float32, device=q.device)
    indices = torch.empty(r, routes, nslots.total, dtype=torch.int32, device=q.device)
    if r == 0:
        return out, lse, indices
    tiles = configs.get("moba.decode", arch(q), d, q.element_size())
    tiles["BLOCK_N"] = min(tiles["BLOCK_N"], head_tile(spec.block_size))
    shared = hq // routes
    splits = shares(q, nslots.total * cdiv(spec.block_size, tiles["BLOCK_N"]), r * routes)
    part = torch.empty(r * hq * splits, d, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(r * hq * splits, 2, dtype=torch.float32, device=q.device)
    decode_kernel[(r * routes * splits,)](
        q, k_pages, v_pages, table, sums, rows, lengths, starts, sinks, out, lse, indices, part, part_lse,
        _zeros(q.device, r * routes), *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], table.stride(0),
        *sums.stride()[:3], page_size, spec.block_size, nslots.sink, nslots.local, nslots.picks, spec.scale,
        STARTS=starts is not None, SINKS=sinks is not None, HEADS=hq // kv_heads, SHARED=shared,
        ROUTES=routes, SPLITS=splits, K=min(ROUND, triton.next_power_of_2(max(nslots.picks, 2))), D=d,
        BLOCK_D=head_tile(d), PRECISION=precision(q.dtype), BLOCK_G=head_tile(shared), **tiles,
    )  # fmt: skip
    return out, lse, indices


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `decode` launches, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict.fromkeys(("q", "k", "v", "out"), x) | {"scale": "fp32"}
    types |= dict.fromkeys(("sums", "sinks", "lse", "part", "part_lse"), "*fp32")
    types |= dict.fromkeys(("table", "rows", "lengths", "starts", "indices", "counter"), "*i32")
    shape = dict(STARTS=False, SINKS=False, HEADS=4, SPLITS=8, D=head_dim, BLOCK_D=head_tile(head_dim), BLOCK_G=16)
    shape["PRECISION"] = "tf32x3" if size == 4 else "tf32"
    config = configs.get("moba.decode", arch, head_dim, size)
    modes = {"head": (1, 8), "group": (4, 8), "rounds": (1, ROUND)}
    return [
        job(f"moba.decode[{name}]", decode_kernel, types, shape | dict(SHARED=n, ROUTES=32 // n, K=k), config, False)
        for name, (n, k) in modes.items()
    ]
