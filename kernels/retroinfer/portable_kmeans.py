"""The paper's segmented clustering, spherical k-means, in plain PyTorch, for all rows and heads of a call at once.

Segments of one length are one batch of problems, `x [P, t, D]`, keys minus their mean. Scores are only held a
cache-sized chunk at a time. Sums follow a stable sort by label, so the same input gives the same bits.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import Plan, Spec

Assign = Callable[[Tensor, Tensor], Tensor]
CHUNK_SCORES = 1 << 20  # scores held at a time: they stay in the caches
CHUNK_TOKENS = 64  # fewest keys a matrix product is worth


class Batch(NamedTuple):
    """The segments of one length: their numbers in the plan, and their keys minus the mean of their row."""

    segments: list[int]
    x: Tensor  # [S * G, t, D]


@torch.no_grad()
def kmeans(
    k: Tensor,
    plan: Plan,
    spec: Spec,
    fit: Callable[[Tensor, int, int], Tensor] | None = None,
    best: Assign | None = None,
) -> Tensor:
    """Labels `[G, n]` int32 of keys `[n, G, D]`: slots of the call, -1 outside the plan.

    `fit(x, count, iterations)` finds the centroids, `lloyd` by default; `best`, `assign` by default, makes the final
    pass.
    """
    fit, best = fit or lloyd, best or assign
    labels = torch.full((k.shape[1], k.shape[0]), -1, dtype=torch.int32, device=k.device)
    found: dict[int, Tensor] = {}
    batches = centred(k, plan)
    for batch in batches:
        centroids = fit(batch.x, plan.clusters[batch.segments[0]], spec.iterations)
        if spec.global_pass:
            found.update(zip(batch.segments, centroids.unflatten(0, (-1, k.shape[1])), strict=True))
        else:
            place(labels, best(batch.x, centroids), batch, plan)
    if spec.global_pass:
        final_pass(labels, batches, found, plan, best)
    if spec.max_cluster:
        for (_, begin, end), count in zip(plan.ranges, plan.slots, strict=True):
            labels[:, begin:end] = split(labels[:, begin:end].long(), count, spec.max_cluster).int()
    return labels


def lloyd(
    x: Tensor,
    count: int,
    iterations: int,
    best: Assign | None = None,
    refine: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Directions `[P, count, D]` after all but the last of `iterations` assignments.

    `best` and `refine` may take the place of `assign` and `update`.
    """
    best, refine = best or assign, refine or update
    centroids = start(x, count)
    for _ in range(iterations - 1):
        centroids = refine(x, best(x, centroids), centroids)
    return centroids


@torch.no_grad()
def iterate(k: Tensor, centroids: Tensor, plan: Plan, spec: Spec) -> tuple[Tensor, Tensor]:
    """One assignment of keys `[n, G, D]` to their segment's `centroids [G, sum(plan.clusters), D]`, then one update."""
    labels = torch.full((k.shape[1], k.shape[0]), -1, dtype=torch.int32, device=k.device)
    parts = list(centroids.split(plan.clusters, 1))
    for batch in centred(k, plan):
        old = torch.cat([parts[i] for i in batch.segments])
        chosen = assign(batch.x, old)
        place(labels, chosen, batch, plan)
        new = update(batch.x, chosen, old).unflatten(0, (-1, k.shape[1]))
        for i, x in zip(batch.segments, new, strict=True):
            parts[i] = x
    return labels, torch.cat(parts, 1)


def centred(k: Tensor, plan: Plan) -> list[Batch]:
    """The plan's segments, batched by length."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    means = {row: k[a:b].mean(0, dtype=dtype) for row, a, b in plan.ranges if b > a}
    by_length: dict[int, list[int]] = {}
    for i, length in enumerate(plan.lengths):
        by_length.setdefault(length, []).append(i)
    batches = []
    for length, members in by_length.items():
        x = torch.empty(len(members), k.shape[1], length, k.shape[2], dtype=dtype, device=k.device)
        for target, i in zip(x, members, strict=True):
            source = k[plan.starts[i] : plan.starts[i] + length].to(dtype)
            torch.sub(source.transpose(0, 1), means[plan.rows[i]][:, None], out=target)
        batches.append(Batch(members, x.flatten(0, 1)))
    return batches


def place(labels: Tensor, chosen: Tensor, batch: Batch, plan: Plan) -> None:
    """Write a batch's clusters where its tokens are, as slots of the call."""
    for i, x in zip(batch.segments, chosen.unflatten(0, (-1, len(labels))), strict=True):
        torch.add(x, plan.first[i], out=labels[:, plan.starts[i] : plan.starts[i] + plan.lengths[i]])


def final_pass(labels: Tensor, batches: list[Batch], found: dict[int, Tensor], plan: Plan, best: Assign) -> None:
    """Assign every key to the best centroid of its whole row, `found` by segment."""
    rows = {row: torch.cat([found[i] for i, r in enumerate(plan.rows) if r == row], 1) for row in set(plan.rows)}
    for batch in batches:
        for i, x in zip(batch.segments, batch.x.split(len(labels)), strict=True):
            begin = plan.starts[i]
            labels[:, begin : begin + plan.lengths[i]] = best(x, rows[plan.rows[i]])


def normalise(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


def start(x: Tensor, count: int) -> Tensor:
    """Directions of `count` evenly strided keys of each problem."""
    step = 2 * torch.arange(count, device=x.device) + 1
    return normalise(x[:, step * x.shape[1] // (2 * count)])


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The best centroid `[P, t]` int32 of each key: ties to the lowest, a NaN above everything."""
    (problems, tokens, _), n = x.shape, centroids.shape[1]
    labels = torch.empty(problems, tokens, dtype=torch.int32, device=x.device)
    # The first maximum without torch.argmax, which is slow on the CPU: maxima score n - index, all others 0.
    mark = torch.arange(n, 0, -1, dtype=x.dtype, device=x.device)

    rows = min(tokens, max(CHUNK_TOKENS, CHUNK_SCORES // n))
    step = max(1, CHUNK_SCORES // (rows * n))
    scratch = x.new_empty(min(step, problems) * rows * n)  # fresh memory is slow
    for p, t in product(range(0, problems, step), range(0, tokens, rows)):
        keys = x[p : p + step, t : t + rows]
        scores = scratch[: keys.shape[0] * keys.shape[1] * n].view(*keys.shape[:2], n)
        torch.bmm(keys, centroids[p : p + step].mT, out=scores)
        best = scores.amax(-1, keepdim=True)
        if best.isnan().any():  # which equals nothing
            found = scores.argmax(-1)
        else:
            found = n - scores.eq_(best).mul_(mark).amax(-1)
        labels[p : p + step, t : t + rows] = found
    return labels


def by_label(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keys of `labels [P, t]` by problem, label and token, `[P * t]`, and where each label begins, `[P * count]`."""
    keys = labels + count * torch.arange(len(labels), dtype=torch.int32, device=labels.device)[:, None]
    ranked, order = keys.flatten().sort(stable=True)
    wanted = torch.arange(len(labels) * count, dtype=torch.int32, device=labels.device)
    return order, torch.searchsorted(ranked, wanted)


def update(x: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Directions of the sums of each cluster's keys; one without a direction keeps its centroid."""
    order, begin = by_label(labels, centroids.shape[1])
    sums = F.embedding_bag(order, x.flatten(0, 1), begin, mode="sum").view_as(centroids)
    norm = torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
    return torch.where(norm > 0, sums / norm.masked_fill(norm == 0, 1), centroids)


def split(labels: Tensor, count: int, most: int) -> Tensor:
    """Cut the clusters of `labels [G, n]` in runs of at most `most` keys, in token order; later slots move up."""
    sizes = torch.zeros(len(labels), count, dtype=torch.long, device=labels.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    pieces = (sizes + most - 1).div(most, rounding_mode="floor").clamp(min=1)
    order = labels.argsort(dim=1, stable=True)
    begin = (sizes.cumsum(1) - sizes).gather(1, labels)
    rank = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    position = torch.empty_like(labels).scatter_(1, order, rank) - begin
    return (pieces.cumsum(1) - pieces).gather(1, labels) + position // most
