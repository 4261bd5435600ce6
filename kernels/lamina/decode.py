"""Split decoding: a program takes a tile of rows of one KV head over one share of their keys (flash-decoding).

Rows of a tile are (query, head) pairs, so that the query heads of a KV head share every key. Shapes alone decide the
launch; a row whose keys end before a share leaves that share empty at once.
"""

from typing import NamedTuple

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
from .spec import Cache

LEAST = 256  # keys of a share at least, unless the caller says how many shares there are
FEW = 32  # rows of a KV head up to which keys are read and little else is done


@triton.jit
def _sweep(
    b_acc, b_m, b_l, b_q, q, o_q, m_q, k, v, table, k_page, k_t, v_page, v_t, page_size, begin, end, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LAYOUT: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys `[begin, end)` from the first of a tile on; whole tiles without MASK."""
    o_n = tl.arange(0, BLOCK_N)
    for n0 in tl.range(begin, end, BLOCK_N):
        valid = n0 + o_n < end
        if LAYOUT == "slots":
            i_page = tl.load(table + (n0 + o_n) // page_size, mask=valid, other=0).to(tl.int64)
            i_t = ((n0 + o_n) % page_size).to(tl.int64)
            p_k, o_k = k, i_page * k_page + i_t * k_t
            p_v, o_v = v, i_page * v_page + i_t * v_t
        else:
            i_page, i_t = tl.zeros([], tl.int64), tl.zeros([], tl.int64) + n0
            if LAYOUT == "pages":
                i_page, i_t = tl.load(table + n0 // page_size).to(tl.int64), i_t % page_size
            p_k, o_k = k + i_page * k_page + i_t * k_t, o_n.to(tl.int64) * k_t
            p_v, o_v = v + i_page * v_page + i_t * v_t, o_n.to(tl.int64) * v_t
        b_k = load_rows(p_k, o_k, valid, D, BLOCK_D, MASK)
        b_s = dot_rows(b_q, b_k, q, o_q, m_q, p_k, o_k, valid, D, PRECISION)
        if MASK:
            b_s = tl.where(valid[None, :], b_s * scale, float("-inf"))
        b_v = load_rows(p_v, o_v, valid, D, BLOCK_D, MASK)
        b_acc, b_m, b_l = softmax_step(b_acc, b_m, b_l, b_s, b_v, scale, MASK, PRECISION)
    return b_acc, b_m, b_l


@triton.jit
def decode_kernel(
    q, k, v, table, lengths, out, lse, q_b, q_t, q_h, k_page, k_t, k_h, v_page, v_t, v_h, o_split, l_split, width,
    page_size, tokens, kv_heads, tiles, splits, least, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles of rows that read the same keys run side by side.
    pid = tl.program_id(0)
    i_tile, i_split = pid % tiles, pid // tiles % splits
    i_h = pid // (tiles * splits) % kv_heads
    i_b = (pid // (tiles * splits) // kv_heads).to(tl.int64)
    length = tl.load(lengths + i_b)
    share = tl.maximum(tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N, least)
    begin = tl.minimum(i_split * share, length)
    end = tl.minimum(begin + share, length)
    o_i, o_h, m_q = tile_rows(i_tile * BLOCK_M, i_h, tokens, HEADS, BLOCK_M)
    if (begin == end) & (splits > 1):  # nobody reads the `out` of an empty state
        o_out = (i_b * tokens + o_i) * (kv_heads * HEADS) + o_h
        b_none = tl.full([BLOCK_M], float("-inf"), tl.float32)
        tl.store(lse + i_split.to(tl.int64) * l_split + o_out, b_none, mask=m_q)
        return

    o_q = i_b * q_b + o_i.to(tl.int64) * q_t + o_h.to(tl.int64) * q_h
    b_q = load_rows(q, o_q, m_q, D, BLOCK_D, True)
    k += i_h.to(tl.int64) * k_h
    v += i_h.to(tl.int64) * v_h
    if LAYOUT == "rows":
        k += i_b * k_page
        v += i_b * v_page
    else:
        table += i_b * width
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale *= LOG2E
    whole = end // BLOCK_N * BLOCK_N
    b_acc, b_m, b_l = _sweep(
        b_acc, b_m, b_l, b_q, q, o_q, m_q, k, v, table, k_page, k_t, v_page, v_t, page_size, begin, whole, scale,
        D, BLOCK_D, BLOCK_N, LAYOUT, False, PRECISION,
    )  # fmt: skip
    b_acc, b_m, b_l = _sweep(
        b_acc, b_m, b_l, b_q, q, o_q, m_q, k, v, table, k_page, k_t, v_page, v_t, page_size,
        tl.maximum(begin, whole), end, scale, D, BLOCK_D, BLOCK_N, LAYOUT, True, PRECISION,
    )  # fmt: skip

    o_out = (i_b * tokens + o_i) * (kv_heads * HEADS) + o_h
    b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    store_rows(out + i_split.to(tl.int64) * o_split, o_out * D, m_q, b_out, D, BLOCK_D)
    b_lse = tl.where(b_l == 0.0, float("-inf"), (b_m + tl.log2(b_l)) * LN2)
    tl.store(lse + i_split.to(tl.int64) * l_split + o_out, b_lse, mask=m_q)


class Pass(NamedTuple):
    """A launch: the same rows as every other one of its call, over keys of their own."""

    q: Tensor  # [B, Tq, Hq, D]
    cache: Cache
    tiles: int
    splits: int
    layout: str
    config: dict[str, int]


def plan(q: Tensor, cache: Cache, splits: int | None) -> Pass:
    """Shares of the keys such that programs fill the device, from shapes alone."""
    (b, tokens, hq, d), (kv_heads, size) = q.shape, (cache.k.shape[2], cache.k.shape[1])
    rows = tokens * (hq // kv_heads)
    config = configs.get(f"lamina.{'few' if rows <= FEW else 'many'}", arch(q), d, q.element_size())
    config["BLOCK_M"] = min(config["BLOCK_M"], head_tile(rows))
    layout = "rows"
    if cache.table is not None:
        layout = "slots" if size % config["BLOCK_N"] else "pages"
        # The pipeline gives a tile's places in the table as many stages as the tile itself.
        config["num_stages"] = 2 * config["num_stages"] - 1
    tiles = cdiv(rows, config["BLOCK_M"])
    if splits is None:
        splits = shares(q, cdiv(capacity(cache), LEAST), b * kv_heads * tiles)
    splits = min(splits, cdiv(capacity(cache), config["BLOCK_N"]))  # no share is less than a tile
    return Pass(q, cache, tiles, splits, layout, config)


def decode(passes: list[Pass], scale: float, coarse: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The state of the rows over the keys of all passes: `out [M, D]` of `dtype`, `lse [M]` float32.

    `coarse` leaves shares of short rows empty, so that none but a row's last has fewer than LEAST keys.
    """
    q, total = passes[0].q, sum(x.splits for x in passes)
    rows, d = q.numel() // q.shape[-1], q.shape[-1]
    out = torch.empty(total, rows, d, dtype=dtype if total == 1 else torch.float32, device=q.device)
    lse = torch.empty(total, rows, dtype=torch.float32, device=q.device)
    first = 0
    for x in passes:
        _launch(x, out[first:], lse[first:], scale, LEAST if coarse else x.config["BLOCK_N"])
        first += x.splits
    if total == 1:
        return out[0], lse[0]
    whole = torch.empty(rows, d, dtype=dtype, device=q.device), torch.empty(rows, dtype=torch.float32, device=q.device)
    parts = out[:, :, None], lse[:, :, None]
    merge(*parts, None, None, False, *(x[:, None] for x in whole), None)
    return whole


def _launch(x: Pass, out: Tensor, lse: Tensor, scale: float, least: int) -> None:
    (b, tokens, hq, d), (k, v, table, lengths) = x.q.shape, x.cache
    kv_heads, width = k.shape[2], 0 if table is None else table.stride(0)
    q, scale = (x.q, scale) if scale >= 0 else (-x.q, -scale)  # whole tiles take the maximum before they scale
    decode_kernel[(x.tiles * x.splits * kv_heads * b,)](
        q, k, v, table, lengths, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out.stride(0),
        lse.stride(0), width, k.shape[1], tokens, kv_heads, x.tiles, x.splits, least, scale,
        HEADS=hq // kv_heads, D=d, BLOCK_D=head_tile(d), LAYOUT=x.layout, PRECISION=precision(q.dtype), **x.config,
    )  # fmt: skip


def capacity(cache: Cache) -> int:
    """Keys that a row has room for."""
    return cache.k.shape[1] * (1 if cache.table is None else cache.table.shape[1])


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `decode` launches, for `kernels/compile.py`."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    types = dict.fromkeys("qkv", x) | dict(out="*fp32", lse="*fp32", table="*i32", lengths="*i32", scale="fp32")
    shape = dict(HEADS=4, D=head_dim, BLOCK_D=head_tile(head_dim), PRECISION="tf32x3" if size == 4 else "tf32")
    modes = {
        "few": ("few", 16, "rows"),
        "few, pages": ("few", 16, "pages"),
        "few, slots": ("few", 16, "slots"),
        "32 rows": ("few", 32, "slots"),
        "many": ("many", 128, "rows"),
        "many, pages": ("many", 128, "pages"),
        "many, slots": ("many", 128, "slots"),
    }
    jobs = []
    for mode, (name, rows, layout) in modes.items():
        config = configs.get(f"lamina.{name}", arch, head_dim, size)
        config["BLOCK_M"] = min(config["BLOCK_M"], rows)
        if layout != "rows":
            config["num_stages"] = 2 * config["num_stages"] - 1
        made = types | ({"out": x} if mode == "few" else {})  # one share
        constants, dot = shape | {"LAYOUT": layout}, rows > 32 and size == 2
        jobs.append(job(f"lamina.decode[{mode}]", decode_kernel, made, constants, config, dot))
    return jobs
