"""RetroInfer in plain PyTorch: any device, any float dtype, float64 included.

Clustering is in `portable_kmeans.py`, a decode step in `portable_attend.py`; here an index takes tokens in.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .portable_attend import attend
from .portable_kmeans import by_label, iterate, kmeans
from .spec import Plan, Spec, Store, from_int8, places, to_int8

__all__ = ["attend", "extend", "iterate", "kmeans", "push", "waiting"]

CHUNK_ELEMENTS = 1 << 22  # elements of keys that are summarised together


class Grouping(NamedTuple):
    """Which token of a call is in which slot, for some heads."""

    slots: Tensor  # [g, n] int32
    order: Tensor  # [g, n] tokens by slot
    begin: Tensor  # [g, count] where each slot begins among the tokens of all these heads


@torch.no_grad()
def extend(store: Store, k: Tensor, v: Tensor, plan: Plan, spec: Spec, labels: Tensor | None = None) -> None:
    """Cluster `k, v [n, G, D]` by the plan and append them to the index, in place.

    `labels [G, n]`: slots of the call, to replay instead. Reads `store.indexed` on the host.
    """
    labels = kmeans(k, plan, spec) if labels is None else labels
    indexed = store.indexed.tolist()
    for (row, begin, end), held, count in zip(plan.ranges, plan.held, plan.slots, strict=True):
        if end == begin:
            continue
        tables = [x[begin:end].reshape(-1, x.shape[2]) for x in (k, v)]
        step = max(1, CHUNK_ELEMENTS // ((end - begin) * k.shape[2]))
        for g in range(0, k.shape[1], step):
            heads = slice(g, g + step)
            mine = Store(*(x[row, heads] if x.dim() > 2 else x[row] for x in store))
            slots = labels[heads, begin:end].int()
            order, runs = by_label(slots, count)
            order = order.view(slots.shape) % (end - begin)
            _append(mine, tables, Grouping(slots, order, runs.view(-1, count)), g, indexed[row], held, spec)
        store.indexed[row] += end - begin
        store.clusters[row] += count


def _append(store: Store, tables: list[Tensor], new: Grouping, first_head: int, at: int, held: int, spec: Spec) -> None:
    """Write the clusters of some heads of a row from `tables [n * G, D]` of its keys and values.

    `store` holds these heads alone, as views.
    """
    (heads, n), count, dim, acc = new.order.shape, new.begin.shape[1], store.k.shape[2], store.radius.dtype
    head = torch.arange(heads, device=new.order.device)[:, None]
    rows = (new.order * (len(tables[0]) // n) + (head + first_head)).flatten()
    everything, members, fresh = (
        torch.arange(heads * n, device=rows.device),
        slice(at, at + n),
        slice(held, held + count),
    )
    bounds = torch.cat([new.begin - head * n, torch.full_like(head, n)], 1)
    sizes = bounds.diff(dim=1).clamp(min=1)[..., None]
    slot = new.slots.gather(1, new.order).long()
    for table, run, means in zip(tables, (store.k, store.v), (store.centroids, store.value_means), strict=True):
        x = table.index_select(0, rows)
        run[:, members] = x.view(heads, n, dim)
        x = x.to(acc)
        sums = F.embedding_bag(everything, x, new.begin.flatten(), mode="sum").view(heads, count, dim)
        if means.dtype == torch.int8:
            kind = int(means is store.value_means)
            means[:, fresh], store.steps[:, fresh, kind] = to_int8(sums / sizes)
        else:
            means[:, fresh] = (sums / sizes).to(means.dtype)
        if means is store.centroids:
            centre = from_int8(means[:, fresh], store.steps[:, fresh], 0).to(acc).reshape(-1, dim)
            centre = centre.index_select(0, (slot + head * count).flatten())
            distance = torch.linalg.vector_norm(centre.sub_(x), dim=-1).view(heads, n)
            store.radius[:, fresh] = distance.new_zeros(heads, count).scatter_reduce_(1, slot, distance, "amax")
    store.offsets[:, held : held + count + 1] = bounds + at
    store.offsets[:, held + count + 1 :] = at + n
    store.tokens[:, members] = new.order + (spec.sink + at)


@torch.no_grad()
def push(store: Store, k: Tensor, v: Tensor, spec: Spec) -> None:
    """Take in one token of every row, `k, v [B, G, D]`."""
    rows, at = torch.arange(len(k), device=k.device), places(store.lengths, spec)
    store.k_steady[rows, :, at] = k
    store.v_steady[rows, :, at] = v
    store.lengths.add_(1)


def waiting(store: Store, rows: list[int], count: int, spec: Spec) -> tuple[Tensor, Tensor]:
    """The oldest `count` tokens of each of `rows` that are not indexed yet, `[len(rows) * count, G, D]`."""
    row = torch.tensor(rows, device=store.indexed.device)[:, None]
    steps = torch.arange(count, device=row.device)
    at = places(spec.sink + store.indexed[row] + steps, spec)
    return store.k_steady[row, :, at].flatten(0, 1), store.v_steady[row, :, at].flatten(0, 1)
