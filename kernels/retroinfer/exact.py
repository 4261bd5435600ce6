"""Stage 3: exact attention over the steady zone and the members of the chosen clusters, split over programs.

The tokens of a KV head form one list: those of the steady zone, then the members of each chosen cluster. A share is a
run of tiles of that list; where a member lies follows from the clusters' prefix sums, so no host and no page table is
asked. Members come from the store or, page by page, from a cache beside it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.attention import softmax_step
from ..states.tiles import LOG2E, arch, cdiv, dot_rows, head_tile, job, load_rows, precision, shares, store_rows
from .select import FIELDS, Zones
from .spec import Spec, Store


class Cached(NamedTuple):
    """Pages of clusters that are held a second time: pages of `page` members, cut from the cluster's first one.

    Member `i` of a cluster `c` that begins at `offsets[c]` lies in page `offsets[c] // page + c + i // page`.
    """

    slot_map: Tensor  # [B, G, M] int32, the place of each page, -1: read the store
    k: Tensor  # [B, G, capacity, page, D]
    v: Tensor  # [B, G, capacity, page, D]


class Parts(NamedTuple):
    """Unfinished softmax states of each share, base 2; a share that had nothing to do holds only its sums."""

    acc: Tensor  # [B, G, S, r, D] float32 sums of weighted values
    sums: Tensor  # [B, G, S, r, 2] float32, the maximum and the sum of weights


@triton.jit
def attend_rows(
    b_acc, b_m, b_l, b_q, q, o_q, m_g, p_k, p_v, m_n, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One softmax step over the keys and values that start at the pointers `p_k, p_v [n]`."""
    o_n = tl.zeros_like(m_n.to(tl.int32))
    b_k = load_rows(p_k[:, None], o_n, m_n, D, BLOCK_D, True)
    b_v = load_rows(p_v[:, None], o_n, m_n, D, BLOCK_D, True)
    b_s = dot_rows(b_q, b_k, q, o_q, m_g, p_k[:, None], o_n, m_n, D, PRECISION) * (scale * LOG2E)
    return softmax_step(b_acc, b_m, b_l, tl.where(m_n[None, :], b_s, float("-inf")), b_v, 1.0, True, PRECISION)


@triton.jit
def find(ends, o_t, width, STEPS: tl.constexpr):
    """The first of `width` rising `ends` above each of `o_t`, which the last one is."""
    low = tl.zeros_like(o_t)
    high = low + width - 1
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        beyond = tl.load(ends + middle) > o_t
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, tl.minimum(middle + 1, high))
    return low


@triton.jit
def store_part(
    acc, sums, i_part, o_g, m_g, b_acc, b_m, b_l, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    o_part = i_part * HEADS + o_g
    store_rows(acc, o_part * D, m_g, b_acc, D, BLOCK_D)
    tl.store(sums + o_part * 2, b_m, mask=m_g)
    tl.store(sums + o_part * 2 + 1, b_l, mask=m_g)


@triton.jit
def store_nothing(sums, i_part, o_g, m_g, HEADS: tl.constexpr):
    o_part = i_part * HEADS + o_g
    tl.store(sums + o_part * 2, tl.full(o_g.shape, float("-inf"), tl.float32), mask=m_g)
    tl.store(sums + o_part * 2 + 1, tl.zeros(o_g.shape, tl.float32), mask=m_g)


@triton.jit
def exact_kernel(
    q, k_steady, v_steady, k, v, offsets, chosen, ends, counts, lengths, indexed, slot_map, k_cache, v_cache, acc, sums,
    q_b, q_h, tokens, places, slots, width, pages, capacity, sink, ring, scale,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr, BUFFERED: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """HEADS query heads share a KV head, the store's rows hold `tokens`, `places` and `slots`, a cache's `capacity`."""
    i_split, i_row = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS).to(tl.int64)
    i_b = i_row // KV_HEADS
    held = tl.load(indexed + i_b)
    steady = tl.load(lengths + i_b) - held
    members = tl.load(counts + i_row * FIELDS + 1)
    o_g, o_n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N)
    m_g = o_g < HEADS
    steady_tiles = tl.cdiv(steady, BLOCK_N)
    tiles = (steady_tiles + tl.cdiv(members, BLOCK_N)).to(tl.int64)
    begin, end = (tiles * i_split // SPLITS).to(tl.int32), (tiles * (i_split + 1) // SPLITS).to(tl.int32)
    i_part = i_row * SPLITS + i_split
    if begin == end:
        store_nothing(sums, i_part, o_g, m_g, HEADS)
        return
    o_q = i_b * q_b + (i_row % KV_HEADS * HEADS + o_g) * q_h
    b_q = load_rows(q, o_q, m_g, D, BLOCK_D, True)
    b_m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_G], tl.float32)
    b_acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)

    k_steady += i_row * places * D
    v_steady += i_row * places * D
    for tile in tl.range(begin, tl.minimum(end, steady_tiles)):
        o_t = tile * BLOCK_N + o_n
        o_x = tl.where(o_t < sink, o_t, sink + (o_t - sink + held) % ring) * D
        b_acc, b_m, b_l = attend_rows(
            b_acc, b_m, b_l, b_q, q, o_q, m_g, k_steady + o_x, v_steady + o_x, o_t < steady, scale, D, BLOCK_D,
            PRECISION,
        )  # fmt: skip

    k += i_row * tokens * D
    v += i_row * tokens * D
    offsets += i_row * (slots + 1)
    chosen += i_row * width
    ends += i_row * width
    if BUFFERED:
        slot_map += i_row * pages
        k_cache += i_row * capacity * PAGE * D
        v_cache += i_row * capacity * PAGE * D
    for tile in tl.range(tl.maximum(begin, steady_tiles), end):
        o_t = (tile - steady_tiles) * BLOCK_N + o_n
        m_n = o_t < members
        o_t = tl.minimum(o_t, members - 1)
        i_chosen = find(ends, o_t, width, STEPS)
        slot = tl.load(chosen + i_chosen)
        at = tl.load(offsets + slot + 1) - (tl.load(ends + i_chosen) - o_t)
        p_k, p_v = k + at.to(tl.int64) * D, v + at.to(tl.int64) * D
        if BUFFERED:
            first = tl.load(offsets + slot)
            place = tl.load(slot_map + first // PAGE + slot + (at - first) // PAGE).to(tl.int64)
            o_x = (place * PAGE + (at - first) % PAGE) * D
            p_k, p_v = tl.where(place >= 0, k_cache + o_x, p_k), tl.where(place >= 0, v_cache + o_x, p_v)
        b_acc, b_m, b_l = attend_rows(
            b_acc, b_m, b_l, b_q, q, o_q, m_g, p_k, p_v, m_n, scale, D, BLOCK_D, PRECISION
        )  # fmt: skip
    store_part(acc, sums, i_part, o_g, m_g, b_acc, b_m, b_l, HEADS, D, BLOCK_D)


def exact(q: Tensor, store: Store, zones: Zones, spec: Spec, scale: float, cached: Cached | None = None) -> Parts:
    """Attention of `q [B, Hq, D]` over what is not indexed and over the members of `zones.chosen`.

    `store.k, store.v` may lie in pinned host memory. With `cached`, pages that it holds are read there.
    """
    (batch, hq, dim), (_, kv_heads, slots) = q.shape, store.radius.shape
    heads, rows, width = hq // kv_heads, batch * kv_heads, zones.chosen.shape[2]
    tokens, places = store.k.shape[2], store.k_steady.shape[2]
    row = configs.get("retroinfer.exact", arch(q), dim, q.element_size())
    splits = shares(q, cdiv(places + tokens, row["BLOCK_N"]), rows)
    acc = torch.empty(batch, kv_heads, splits, heads, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, kv_heads, splits, heads, 2, dtype=torch.float32, device=q.device)
    held = (None, None, None) if cached is None else cached
    pages, capacity, page = (0, 0, 1) if cached is None else (cached.slot_map.shape[2], *cached.k.shape[2:4])
    exact_kernel[(rows * splits,)](
        q, store.k_steady, store.v_steady, store.k, store.v, store.offsets, zones.chosen, zones.ends, zones.counts,
        store.lengths, store.indexed, *held, acc, sums, *q.stride()[:2], tokens, places, slots, width, pages, capacity,
        spec.sink, spec.ring, scale, KV_HEADS=kv_heads, HEADS=heads, SPLITS=splits, STEPS=width.bit_length(),
        BUFFERED=cached is not None, PAGE=page, D=dim, BLOCK_D=head_tile(dim), PRECISION=precision(q.dtype),
        BLOCK_G=head_tile(heads), **row,
    )  # fmt: skip
    return Parts(acc, sums)


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `exact` launches, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict.fromkeys(("q", "k_steady", "v_steady", "k", "v", "k_cache", "v_cache"), x)
    types |= dict.fromkeys(("acc", "sums"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("offsets", "chosen", "ends", "counts", "lengths", "indexed", "slot_map"), "*i32")
    shape = dict(KV_HEADS=8, HEADS=4, SPLITS=16, STEPS=8, PAGE=8, D=head_dim, BLOCK_D=head_tile(head_dim), BLOCK_G=16)
    shape["PRECISION"] = "tf32x3" if size == 4 else "tf32"
    row = configs.get("retroinfer.exact", arch, head_dim, size)
    return [
        job(f"retroinfer.exact[{name}]", exact_kernel, types, shape | dict(BUFFERED=name == "buffered"), row, False)
        for name in ("store", "buffered")
    ]
