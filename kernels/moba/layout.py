"""Stage 3: for every (block, KV head), the ascending list of the (query, head, slot) triples that chose it.

A stable counting sort in two passes. A chunk of queries counts its choices per key, one prefix sum over (key, chunk)
turns counts into places, and each chunk then walks its choices in order. The only atomics add up counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import arch, job
from .spec import Geometry, Spec, cdiv

NARROWEST = 128  # queries per chunk, so that short contexts do not make chunks of a handful


@triton.jit
def choices(indices, query_seq, query_pos, cu_blocks, nq, span, slots, block_size, i, CAUSAL: tl.constexpr,
            HR: tl.constexpr, HKV: tl.constexpr):  # fmt: skip
    """The `i`-th choices of this program's chunk and KV head: their pairs, keys, and which of them name a block."""
    group = HR // HKV
    head = tl.program_id(1)
    t = tl.program_id(0) * span + i // (group * slots)
    rest = i % (group * slots)
    pair = (t * HR + head * group) * slots + rest
    live = (i < span * group * slots) & (t < nq)
    seq = tl.load(query_seq + t, mask=live, other=0)
    base = tl.load(cu_blocks + seq, mask=live, other=0)
    if CAUSAL:
        live = live & (rest % slots > 0)
        limit = tl.load(query_pos + t, mask=live, other=0) // block_size
    else:
        limit = tl.load(cu_blocks + seq + 1, mask=live, other=0) - base
    block = tl.load(indices + pair, mask=live, other=-1)
    return pair, (base + block) * HKV + head, live & (block >= 0) & (block < limit)


@triton.jit
def count_kernel(indices, table, query_seq, query_pos, cu_blocks, nq, span, slots, block_size, CAUSAL: tl.constexpr,
                 HR: tl.constexpr, HKV: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    for i in range(0, span * (HR // HKV) * slots, COUNT):
        _, key, live = choices(indices, query_seq, query_pos, cu_blocks, nq, span, slots, block_size,
                               i + tl.arange(0, COUNT), CAUSAL, HR, HKV)  # fmt: skip
        tl.atomic_add(table + key * chunks + chunk, 1, mask=live, sem="relaxed")


@triton.jit
def place_kernel(indices, table, pairs, query_seq, query_pos, cu_blocks, nq, span, slots, block_size,
                 CAUSAL: tl.constexpr, HR: tl.constexpr, HKV: tl.constexpr, PLACE: tl.constexpr):  # fmt: skip
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, PLACE)
    for i in range(0, span * (HR // HKV) * slots, PLACE):
        pair, key, live = choices(indices, query_seq, query_pos, cu_blocks, nq, span, slots, block_size, i + lane,
                                  CAUSAL, HR, HKV)  # fmt: skip
        key = tl.where(live, key, -1)
        same = key[:, None] == key[None, :]
        rank = tl.sum((same & (lane[None, :] < lane[:, None])).to(tl.int32), 1)
        last = live & (rank + 1 == tl.sum(same.to(tl.int32), 1))
        p_next = table + key * chunks + chunk
        place = tl.load(p_next, mask=live, other=0) + rank
        tl.store(pairs + place, pair, mask=live)
        tl.debug_barrier()  # every lane has read its key's next place before the last of that key moves it on
        tl.store(p_next, place + 1, mask=last)
        tl.debug_barrier()


def segment(geo: Geometry, q_start: int, q_end: int) -> Geometry:
    """The geometry of queries `q_start..q_end-1` alone; keys and blocks stay as they are."""
    cu_q = geo.cu_q.clamp(q_start, q_end) - q_start
    return geo._replace(cu_q=cu_q, query_seq=geo.query_seq[q_start:q_end], query_pos=geo.query_pos[q_start:q_end])


def layout(indices: Tensor, geo: Geometry, spec: Spec, hkv: int, q_start: int, q_end: int) -> tuple[Tensor, Tensor]:
    """Sort the choices of queries `q_start..q_end-1`, own slots left out, by `key = global_block * Hkv + kv_head`.

    Returns `pairs` int32, `((t - q_start) * Hr + head) * slots + slot`, and `offsets [keys + 1]` int32: a key's pairs
    are `pairs[offsets[key]:offsets[key + 1]]`. Past `offsets[-1]`, `pairs` holds nothing. Indices outside a sequence's
    candidates (not before the own block, or past the last) are read as "no block".
    """
    nq, (_, hr, slots) = q_end - q_start, indices.shape
    span = max(NARROWEST, geo.num_blocks)  # keeps the table [keys, chunks] no larger than pairs + keys
    chunks, keys = max(1, cdiv(nq, span)), geo.num_blocks * hkv
    pairs = torch.empty(nq * hr * slots, dtype=torch.int32, device=indices.device)
    table = torch.zeros(keys * chunks + 1, dtype=torch.int32, device=indices.device)
    if not pairs.numel() or not keys:
        return pairs, table[::chunks]
    row = configs.get("moba.layout", arch(indices), 256, 4)
    options = {"num_warps": row["num_warps"]}
    rows = slice(q_start, q_end)
    inputs = (geo.query_seq[rows], geo.query_pos[rows], geo.cu_blocks, nq, span, slots, spec.block_size)
    meta = {"CAUSAL": spec.causal, "HR": hr, "HKV": hkv, **options}
    chosen = indices[rows].contiguous()
    count_kernel[chunks, hkv](chosen, table[1:], *inputs, COUNT=row["COUNT"], **meta)
    table.cumsum_(0)
    offsets = table[::chunks].clone()
    place_kernel[chunks, hkv](chosen, table, pairs, *inputs, PLACE=row["PLACE"], **meta)
    return pairs, offsets


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `layout` launches, for `kernels/compile.py`."""
    row = configs.get("moba.layout", arch, 256, 4)
    warps = row.pop("num_warps")
    types = dict.fromkeys(("indices", "table", "pairs", "query_seq", "query_pos", "cu_blocks"), "*i32")
    shape = {"CAUSAL": True, "HR": 32, "HKV": 8}
    return [
        job(f"moba.layout[{tile.lower()}]", fn, types, shape, {tile: row[tile], "num_warps": warps}, dot=False)
        for fn, tile in ((count_kernel, "COUNT"), (place_kernel, "PLACE"))
    ]
