"""What RetroInfer's backends agree on: who is clustered with whom, how an index lies in memory, and the counts.

Torch only: the portable and the GPU backends share this page. Legend: `B` rows, `G` KV heads, `Hq = G r` query heads,
`D` head size, `N` tokens that can be indexed, `C` cluster slots, `W` places of the steady zone.

A token's place, by its position in the row: positions below `sink` stay, later ones go to a ring of
`local + update_every` places until they are indexed. An indexed token lies in `k, v` in cluster order. All counts
follow from lengths, so the host knows them without asking the device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """How rows are indexed, after validation."""

    sink: int
    local: int
    segment: int
    tokens_per_cluster: int
    iterations: int
    global_pass: bool
    max_cluster: int  # larger clusters are split; 0: none is
    update_every: int

    @property
    def ring(self) -> int:
        return self.local + self.update_every


class Store(NamedTuple):
    """The index of a batch. An empty slot has size 0 and takes part in nothing; those past `clusters` are empty."""

    centroids: Tensor  # [B, G, C, D] mean of the members' keys, of the keys' dtype or int8
    value_means: Tensor  # [B, G, C, D]
    radius: Tensor  # [B, G, C] largest distance of a member to the stored centroid
    steps: Tensor  # [B, G, C, 2] bfloat16, what 1 is worth in int8 centroids and value means; [B, G, C, 0]: not int8
    offsets: Tensor  # [B, G, C + 1] int32, exclusive prefix sums of the sizes
    tokens: Tensor  # [B, G, N] int32, the position in the row of each member, in cluster order
    k: Tensor  # [B, G, N, D] in cluster order; in a cluster by position
    v: Tensor  # [B, G, N, D]
    k_steady: Tensor  # [B, G, W, D]
    v_steady: Tensor  # [B, G, W, D]
    lengths: Tensor  # [B] int32 tokens of a row
    indexed: Tensor  # [B] int32 of them indexed
    clusters: Tensor  # [B] int32 slots in use
    budgets: Tensor  # [B, 2] int32 clusters of the retrieval and the estimation zone

    @property
    def sizes(self) -> Tensor:
        return self.offsets.diff(dim=-1)

    @property
    def value_sums(self) -> Tensor:
        return from_int8(self.value_means, self.steps, 1) * self.sizes[..., None]


class Plan(NamedTuple):
    """One clustering call over ranges of a source of tokens `[n, G, D]`. A slot counts from the first of its call."""

    rows: tuple[int, ...]  # per segment: the row it belongs to,
    starts: tuple[int, ...]  # its first token in the source,
    lengths: tuple[int, ...]
    clusters: tuple[int, ...]
    first: tuple[int, ...]  # and the slot of its first cluster, before any split
    ranges: tuple[tuple[int, int, int], ...]  # per row of the call: row, first token in the source, end
    held: tuple[int, ...]  # the slots the row had before,
    slots: tuple[int, ...]  # and those the call adds


class Query(NamedTuple):
    """The options of one decode step, after validation."""

    scale: float
    reduce: str  # over a group's query heads: "sum", "mean", "max"
    weight_by_size: bool
    estimation: str  # "ratio": as many clusters as `budgets` say; "all" the others; "none"
    k_slots: int  # width of `chosen`: the most clusters any row may retrieve
    max_error: float  # 0: as many as `budgets` say; else as many as the bound asks for, so k_slots counts all
    bounds: bool


class Attended(NamedTuple):
    """`chosen`: the slots read exactly, ascending, -1 behind. `lower, upper` bound the share that was not read."""

    out: Tensor  # [B, Hq, D]
    lse: Tensor  # [B, Hq] float32 (float64)
    chosen: Tensor  # [B, G, k_slots] int32
    lower: Tensor | None  # [B, Hq]
    upper: Tensor | None


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def segments(tokens: int, spec: Spec) -> list[int]:
    """Lengths of the segments of a call over `tokens` tokens of a row."""
    full, rest = divmod(tokens, spec.segment)
    return [spec.segment] * full + [rest] * (rest > 0)


def slots(tokens: int, spec: Spec) -> int:
    """Slots that one call over `tokens` tokens of a row adds."""
    extra = tokens // spec.max_cluster if spec.max_cluster else 0
    return sum(cdiv(t, spec.tokens_per_cluster) for t in segments(tokens, spec)) + extra


def slot_capacity(tokens: int, spec: Spec) -> int:
    """Slots that are enough for `tokens` indexed tokens of a row, however many calls they came in."""
    partial = cdiv(tokens, spec.update_every) + cdiv(tokens, spec.segment) + 1
    extra = tokens // spec.max_cluster if spec.max_cluster else 0
    return cdiv(tokens, spec.tokens_per_cluster) + partial + extra


def plan(spec: Spec, ranges: list[tuple[int, int, int]], clusters: list[int]) -> Plan:
    """A call over `ranges = [(row, start, end), ...]` of its source, each row once; `clusters[row]` are its slots."""
    found: list[tuple[int, int, int, int, int]] = []
    for row, start, end in ranges:
        first = 0
        for length in segments(end - start, spec):
            count = cdiv(length, spec.tokens_per_cluster)
            found.append((row, start, length, count, first))
            start, first = start + length, first + count
    columns = tuple(zip(*found, strict=True)) if found else ((),) * 5
    held = tuple(clusters[row] for row, _, _ in ranges)
    return Plan(*columns, tuple(ranges), held, tuple(slots(end - start, spec) for _, start, end in ranges))


def part(ratio: float, count: int) -> int:
    """A share of `count` clusters, rounded half up; at least one unless the ratio is 0."""
    return min(count, max(1, math.floor(ratio * count + 0.5))) if ratio > 0 and count else 0


def budget(retrieval_ratio: float, estimation_ratio: float, estimation: str, count: int) -> tuple[int, int]:
    """Clusters of the two zones of a row with `count` slots: its line of `Store.budgets`."""
    k = part(retrieval_ratio, count)
    e = {"ratio": part(estimation_ratio, count), "all": count, "none": 0}[estimation]
    return k, min(e, count - k)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [..., D]` as int8, and the bfloat16 steps `[...]`, rounded up, so that no value is cut off.

    Each value is at most half a step off. One that is not finite makes its row's step so.
    """
    step = (x.abs().amax(-1) * ((1 + 2**-8) / 127)).to(torch.bfloat16)
    counts = (x / step.to(x.dtype)[..., None]).round_().nan_to_num_(0)  # the cast of a NaN is anybody's guess
    return counts.clamp_(-127, 127).to(torch.int8), step


def from_int8(x: Tensor, steps: Tensor, kind: int) -> Tensor:
    """Centroids (`kind` 0) or value means (1) as numbers: as they are, or float32 where they are int8."""
    return x * steps[..., kind, None].float() if x.dtype == torch.int8 else x


def places(positions: Tensor, spec: Spec) -> Tensor:
    """Where the tokens at `positions` of a row lie in the steady zone."""
    return torch.where(positions < spec.sink, positions, spec.sink + (positions - spec.sink) % spec.ring)


def steady(lengths: Tensor, indexed: Tensor, spec: Spec) -> Tensor:
    """Mask [B, W] of the places of the steady zone that hold a token."""
    sink = torch.arange(spec.sink, device=lengths.device) < lengths[:, None]
    age = (torch.arange(spec.ring, device=lengths.device) - indexed[:, None]) % spec.ring
    return torch.cat([sink, age < (lengths - spec.sink - indexed)[:, None]], 1)


def allocate(
    batch: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    spec: Spec,
    dtype: torch.dtype,
    device: torch.device | str,
    int8: bool = False,
) -> Store:
    """An empty index of rows of up to `capacity` tokens in all; `int8`: centroids and value means are."""
    tokens = max(0, capacity - spec.sink - spec.local)
    count, width = slot_capacity(tokens, spec), spec.sink + spec.ring
    lead, acc = (batch, kv_heads), torch.promote_types(dtype, torch.float32)

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Store(
        *(zeros(*lead, count, head_dim, dtype=torch.int8 if int8 else dtype) for _ in range(2)),
        zeros(*lead, count, dtype=acc),
        zeros(*lead, count, 2 if int8 else 0, dtype=torch.bfloat16),
        zeros(*lead, count + 1),
        zeros(*lead, tokens),
        *(zeros(*lead, tokens, head_dim, dtype=dtype) for _ in range(2)),
        *(zeros(*lead, width, head_dim, dtype=dtype) for _ in range(2)),
        *(zeros(batch) for _ in range(3)),
        zeros(batch, 2),
    )
