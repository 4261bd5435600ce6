"""Stage 2: which clusters each KV head reads and which it estimates: the best by rank, ties to the lowest slot.

Nothing is sorted. The rank of the last one taken is found digit by digit from histograms, and one sweep then lists
what lies above it and as many of its equals as still fit, in memory's order. Counts come from the device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import arch, job
from .score import Scores, cluster_sizes
from .spec import Query, Store

BINS: tl.constexpr = tl.constexpr(256)
FIELDS: tl.constexpr = tl.constexpr(3)


class Zones(NamedTuple):
    """The retrieval and the estimation zone of each KV head, slots ascending."""

    chosen: Tensor  # [B, G, K] int32 slots to read, -1 behind
    ends: Tensor  # [B, G, K] int32 members of these up to and with each
    guessed: Tensor  # [B, G, C] int32 slots to estimate; undefined behind
    counts: Tensor  # [B, G, 3] int32: clusters to read, their members, clusters to estimate


@triton.jit
def _load_ranks(ranks, o_n, valid):
    """Ranks as unsigned numbers, 0 for a slot without members."""
    return tl.load(ranks + o_n, mask=valid, other=-(2**31)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _next_digit(b_bins, last, need):
    """The digit of the `need`-th largest rank that starts with `last`; also, how many of its equals are still due."""
    digit = tl.sum((tl.cumsum(b_bins, 0, reverse=True) >= need).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, BINS) > digit, b_bins, 0), 0)
    return last * 256 + digit.to(tl.uint32), need - above


@triton.jit
def _best(b_rank, last, due, seen):
    """What is better than `last`, and `due` of its equals in order after the `seen` ones; how many those are now."""
    equal = (b_rank == last).to(tl.int32)
    before = seen + tl.cumsum(equal, 0) - equal
    return (b_rank > last) | ((equal > 0) & (before < due)), seen + tl.sum(equal, 0)


@triton.jit
def select_kernel(
    ranks, offsets, clusters, budgets, wanted, chosen, ends, guessed, counts, wanted_b, wanted_h, slots, width,
    KV_HEADS: tl.constexpr, ESTIMATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per KV head: it reads `wanted[b, g]` clusters, no more than `width`, and estimates the next."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b = i_row // KV_HEADS
    count = tl.load(clusters + i_b)
    ranks += i_row * slots
    offsets += i_row * (slots + 1)
    first_due = tl.minimum(tl.load(wanted + i_b * wanted_b + i_row % KV_HEADS * wanted_h), width)
    second_due = first_due
    if ESTIMATION == "ratio":
        second_due += tl.load(budgets + i_b * 2 + 1)
    elif ESTIMATION == "all":
        second_due += count
    first, second = tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32)
    for i in tl.static_range(4):
        b_first, b_second = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32)
        for n in tl.range(0, count, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            b_rank = _load_ranks(ranks, o_n, o_n < count) >> (24 - 8 * i)
            live = (o_n < count) & (_load_ranks(ranks, o_n, o_n < count) != 0)
            digit, start = (b_rank & 255).to(tl.int32), b_rank >> 8
            b_first += tl.histogram(digit, BINS, mask=live & (start == first))
            b_second += tl.histogram(digit, BINS, mask=live & (start == second))
        if i == 0:  # every cluster with members is counted here
            first_due = tl.minimum(first_due, tl.sum(b_first, 0))
            second_due = tl.minimum(second_due, tl.sum(b_first, 0))
        first, first_due = _next_digit(b_first, first, first_due)
        second, second_due = _next_digit(b_second, second, second_due)

    chosen += i_row * width
    ends += i_row * width
    guessed += i_row * slots
    taken, members, more, first_seen, second_seen = 0, 0, 0, 0, 0
    for n in tl.range(0, count, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_rank = _load_ranks(ranks, o_n, o_n < count)
        read, first_seen = _best(b_rank, first, first_due, first_seen)
        near, second_seen = _best(b_rank, second, second_due, second_seen)
        near = near & (read == 0)
        size = tl.where(read, cluster_sizes(offsets, o_n, o_n < count), 0)
        place = taken + tl.cumsum(read.to(tl.int32), 0) - 1
        tl.store(chosen + place, o_n, mask=read)
        tl.store(ends + place, members + tl.cumsum(size, 0), mask=read)
        tl.store(guessed + more + tl.cumsum(near.to(tl.int32), 0) - 1, o_n, mask=near)
        taken += tl.sum(read.to(tl.int32), 0)
        members += tl.sum(size, 0)
        more += tl.sum(near.to(tl.int32), 0)
    for n in tl.range(taken, width, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        tl.store(chosen + o_n, -1, mask=o_n < width)
        tl.store(ends + o_n, members, mask=o_n < width)
    tl.store(counts + i_row * FIELDS, taken)
    tl.store(counts + i_row * FIELDS + 1, members)
    tl.store(counts + i_row * FIELDS + 2, more)


def select(scored: Scores, store: Store, query: Query, wanted: Tensor) -> Zones:
    """The zones of each KV head; `wanted [B, G]` int32 clusters are read, `query.k_slots` at most."""
    batch, kv_heads, slots = scored.ranks.shape
    chosen = torch.empty(batch, kv_heads, query.k_slots, dtype=torch.int32, device=scored.ranks.device)
    ends, guessed = torch.empty_like(chosen), torch.empty_like(scored.ranks)
    counts = torch.empty(batch, kv_heads, FIELDS.value, dtype=torch.int32, device=scored.ranks.device)
    select_kernel[(batch * kv_heads,)](
        scored.ranks, store.offsets, store.clusters, store.budgets, wanted, chosen, ends, guessed, counts,
        *wanted.stride(), slots, query.k_slots, KV_HEADS=kv_heads, ESTIMATION=query.estimation,
        **configs.get("retroinfer.select", arch(scored.ranks), 1, 4),
    )  # fmt: skip
    return Zones(chosen, ends, guessed, counts)


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What `select` launches, for `kernels/compile.py`."""
    pointers = ("ranks", "offsets", "clusters", "budgets", "wanted", "chosen", "ends", "guessed", "counts")
    types, shape = dict.fromkeys(pointers, "*i32"), dict(KV_HEADS=8, ESTIMATION="ratio")
    return [job("retroinfer.select", select_kernel, types, shape, configs.get("retroinfer.select", arch, 1, 4), False)]
