"""Stage 2: each query's best blocks, streaming over tiles of centroids; scores never leave registers.

A score and its block make one int64 key, ordered as float32 and then by falling block index. Keys are unique, so the
best are exact under ties, and more than `WIDTH` of them come in rounds: the best below the worst of the round before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import arch, cut, head_tile, job, load_rows, ordered
from .spec import Geometry, Slots, Spec

WIDEST = 32
NO_SCORE = tl.constexpr(-(2**31))
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def unordered(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def split_tf32(x):
    """`x` as a sum of two numbers of TF32's 11 significant bits; infinities and NaN stay in the first."""
    fits = tl.abs(x) < 1e38
    big = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    big = tl.where(fits, big, x)
    return big, tl.where(fits, x - big, 0.0)


@triton.jit
def affinity(b_q, b_c, PRODUCTS: tl.constexpr):
    """Scores `[m, n]` as good as float32's: by FMA, two TF32 products where TF32 holds `b_q`, or three."""
    b_c = tl.trans(b_c)
    if PRODUCTS == 1:
        s = tl.dot(b_q, b_c, input_precision="ieee")
    else:
        big, small = split_tf32(b_c)
        if PRODUCTS == 2:
            s = tl.dot(b_q, small, input_precision="tf32")
        else:
            b_q, rest = split_tf32(b_q)
            s = tl.dot(rest, big, tl.dot(b_q, small, input_precision="tf32"), input_precision="tf32")
        s = tl.dot(b_q, big, s, input_precision="tf32")
    return s


@triton.jit
def put(indices, scores, p, block, mask, SCORES: tl.constexpr):
    """Store blocks chosen by rule."""
    tl.store(indices + p, block, mask=mask)
    if SCORES:
        tl.store(scores + p, tl.where(block >= 0, float("inf"), -float("inf")), mask=mask)


@triton.jit
def load_queries(q, o_q, m_t, q_h, SUMMED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """float32 rows of q, added up over the heads that choose together."""
    b_q = load_rows(q, o_q, m_t, D, BLOCK_D, True).to(tl.float32)
    for j in tl.static_range(1, SUMMED):
        b_q += load_rows(q + j * q_h, o_q, m_t, D, BLOCK_D, True).to(tl.float32)
    return b_q


@triton.jit
def affinity_in_steps(q, o_q, m_t, c, o_c, m_n, q_h, PRODUCTS: tl.constexpr, SUMMED: tl.constexpr, D: tl.constexpr,
                      DEPTH: tl.constexpr):  # fmt: skip
    """`affinity` of whole rows, `DEPTH` elements of the head at a time."""
    s = tl.zeros([m_t.shape[0], m_n.shape[0]], tl.float32)
    i_d = tl.arange(0, DEPTH)
    p_q, p_c = q + o_q[:, None] + i_d[None, :], c + o_c[:, None] + i_d[None, :]
    for d in range(0, D, DEPTH):
        m = m_t[:, None] & (d + i_d < D)[None, :]
        b_q = tl.load(p_q + d, mask=m, other=0.0).to(tl.float32)
        for j in tl.static_range(1, SUMMED):
            b_q += tl.load(p_q + d + j * q_h, mask=m, other=0.0).to(tl.float32)
        b_c = tl.load(p_c + d, mask=m_n[:, None] & (d + i_d < D)[None, :], other=0.0)
        s += affinity(b_q, b_c, PRODUCTS)
    return s


@triton.jit
def best_keys(top, b_q, q, o_q, m_t, c, sink, stop, longest, below, q_h, c_n, PRODUCTS: tl.constexpr,
              SUMMED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
              DEPTH: tl.constexpr):  # fmt: skip
    """Replace the worst keys of `top [m, w]` by better ones, under `below[m]`, of blocks `sink <= n < stop[m]`."""
    i_n = tl.arange(0, BLOCK_N)
    for n in range(sink, longest, BLOCK_N):
        if DEPTH >= D:
            s = affinity(b_q, load_rows(c, i_n * c_n, n + i_n < longest, D, BLOCK_D, True), PRODUCTS)
        else:
            s = affinity_in_steps(q, o_q, m_t, c, i_n * c_n, n + i_n < longest, q_h, PRODUCTS, SUMMED, D, DEPTH)
        c += BLOCK_N * c_n
        keys = (ordered(s).to(tl.int64) << 32) | (0x7FFFFFFF - n - i_n).to(tl.int64)[None, :]
        keys = tl.where((n + i_n[None, :] < stop[:, None]) & (keys < below[:, None]), keys, NO_KEY)
        best, worst = tl.max(keys, 1), tl.min(top, 1)
        while tl.max((best > worst).to(tl.int32), 0) > 0:
            top = tl.where((top == worst[:, None]) & (best > worst)[:, None], best[:, None], top)
            keys = tl.where(keys == best[:, None], NO_KEY, keys)
            best, worst = tl.max(keys, 1), tl.min(top, 1)
    return top


@triton.jit
def gate_kernel(
    q, c, indices, scores, owner, first, cu_q, cu_blocks, query_pos, q_t, q_h, num_seqs, block_size, sink, local, picks,
    slots,
    CAUSAL: tl.constexpr, SCORES: tl.constexpr, HR: tl.constexpr, HKV: tl.constexpr, SUMMED: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    item = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the longest rows come last: start with them
    head = tl.program_id(1)
    seq = tl.load(owner + item)
    if seq >= num_seqs:
        return
    t = tl.load(cu_q + seq) + (item - tl.load(first + seq)) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_t = t < tl.load(cu_q + seq + 1)
    base = tl.load(cu_blocks + seq)
    count = tl.load(cu_blocks + seq + 1) - base
    p = (t.to(tl.int64) * HR + head) * slots
    if CAUSAL:
        own = tl.load(query_pos + t, mask=m_t, other=0) // block_size
        put(indices, scores, p, own, m_t, SCORES)
        p += 1
    else:
        own = tl.where(m_t, count, 0)
    for j in range(sink):
        put(indices, scores, p + j, tl.where(j < own, j, -1), m_t, SCORES)
    for j in range(local):
        put(indices, scores, p + sink + j, tl.where(own - 1 - j >= sink, own - 1 - j, -1), m_t, SCORES)
    p += sink + local

    o_q = t.to(tl.int64) * q_t + head.to(tl.int64) * (SUMMED * q_h)
    b_q = load_queries(q, o_q, m_t, q_h, SUMMED, D, BLOCK_D)
    PRODUCTS: tl.constexpr = 1 if q.dtype.element_ty == tl.float32 else (2 if SUMMED == 1 else 3)

    c += ((base + sink).to(tl.int64) * HKV + head // (HR // HKV)) * D
    stop = own - local
    longest = tl.max(stop, 0)
    i_w = tl.arange(0, WIDTH)
    below = tl.full([BLOCK_M], 2**63 - 1, tl.int64)
    for done in range(0, picks, WIDTH):
        top = tl.zeros([BLOCK_M, WIDTH], tl.int64) + (i_w.to(tl.int64) + NO_KEY)[None, :]
        until = tl.where(done < longest - sink, longest, 0)
        top = best_keys(top, b_q, q, o_q, m_t, c, sink, stop, until, below, q_h, HKV * D, PRODUCTS,
                        SUMMED, D, BLOCK_D, BLOCK_N, DEPTH)  # fmt: skip
        below = tl.min(top, 1)
        top = tl.sort(top, dim=1, descending=True)
        found = (top >> 32).to(tl.int32)
        none = found == NO_SCORE
        m = m_t[:, None] & (done + i_w < picks)[None, :]
        at = p[:, None] + done + i_w[None, :]
        tl.store(indices + at, tl.where(none, -1, 0x7FFFFFFF - (top & 0x7FFFFFFF).to(tl.int32)), mask=m)
        if SCORES:
            tl.store(scores + at, tl.where(none, -float("inf"), unordered(found)), mask=m)


def gate(
    q: Tensor, centroids: Tensor, geo: Geometry, spec: Spec, nslots: Slots, want_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """Fill every slot (`spec.py` says what is where): `indices [Nq, Hr, slots]` int32 and, if wanted, their scores."""
    nq, hq, dim = q.shape
    hkv = centroids.shape[1]
    hr = hkv if spec.group else hq
    indices = torch.empty(nq, hr, nslots.total, dtype=torch.int32, device=q.device)
    scores = torch.empty_like(indices, dtype=torch.float32) if want_scores else None
    if indices.numel():
        row = _tiles(arch(q), dim, q.element_size(), hq // hr)
        owner, first = cut(geo.cu_q.diff(), nq, row["BLOCK_M"])
        gate_kernel[owner.numel(), hr](
            q, centroids, indices, scores, owner, first, geo.cu_q, geo.cu_blocks, geo.query_pos,
            *q.stride()[:2], geo.cu_q.numel() - 1, spec.block_size,
            nslots.sink, nslots.local, nslots.picks, nslots.total,
            CAUSAL=spec.causal, SCORES=want_scores, HR=hr, HKV=hkv, SUMMED=hq // hr, WIDTH=width(nslots.picks),
            D=dim, BLOCK_D=head_tile(dim), **row,
        )  # fmt: skip
    return indices, scores


def width(picks: int) -> int:
    """How many picks one round keeps."""
    return max(4, min(WIDEST, triton.next_power_of_2(picks)))


def _tiles(arch: int, head_dim: int, dtype_bytes: int, summed: int) -> dict[str, int]:
    row = configs.get("moba.gate", arch, head_dim, dtype_bytes)
    if summed > 1:  # a third product needs the registers
        row |= {"BLOCK_N": min(row["BLOCK_N"], 32), "DEPTH": min(row["DEPTH"], 16)}
    return row


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `gate` launches, for `kernels/compile.py`."""
    types = {"q": f"*{dtype}", "c": "*fp32", "scores": "*fp32"}
    types |= dict.fromkeys(("indices", "owner", "first", "cu_q", "cu_blocks", "query_pos"), "*i32")
    jobs = []
    for picks, summed in ((7, 1), (32, 1), (7, 4)):
        shape = {"CAUSAL": True, "SCORES": False, "HR": 32 // summed, "HKV": 8, "SUMMED": summed}
        shape |= {"WIDTH": width(picks), "D": head_dim, "BLOCK_D": head_tile(head_dim)}
        name = f"moba.gate[{'group' if summed > 1 else 'head'},{width(picks)}]"
        row = _tiles(arch, head_dim, 4 if dtype == "fp32" else 2, summed)
        jobs.append(job(name, gate_kernel, types, shape, row, dot=dtype != "fp32"))
    return jobs
