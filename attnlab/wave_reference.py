"""The reference of RetroInfer on the tensors of a `WaveIndex`: row by row, from the tokens and their grouping alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.retroinfer.buffer import Cache, check_fits
from .kernels.retroinfer.spec import Attended, Plan, Query, Spec, Store, places
from .reference import retroinfer as reference
from .reference.wave_buffer import PolicyModel, cluster_pages


class Row(NamedTuple):
    """A row in token order."""

    k: Tensor  # [t, G, D]
    v: Tensor  # [t, G, D]
    labels: Tensor  # [G, indexed] int64, slot of each indexed token


def options(spec: Spec) -> reference.Options:
    return reference.Options(
        spec.sink, spec.local, spec.segment, spec.tokens_per_cluster, spec.iterations,
        "global" if spec.global_pass else "segment", spec.max_cluster or None, spec.update_every,
    )  # fmt: skip


def kmeans(k: Tensor, plan: Plan, spec: Spec) -> Tensor:
    """The slot within the call of each token of the source `k [n, G, D]`, `[G, n]` int32; -1 outside the plan."""
    labels = torch.full((k.shape[1], k.shape[0]), -1, dtype=torch.int32, device=k.device)
    for _, start, end in plan.ranges:
        for g in range(k.shape[1]):
            labels[g, start:end] = reference.segmented_kmeans(k[start:end, g], options(spec))[0]
    return labels


def steady_positions(length: int, indexed: int, spec: Spec, device: torch.device) -> Tensor:
    """Positions, ascending, of a row's tokens that are not indexed."""
    t = torch.arange(length, device=device)
    return t[(t < spec.sink) | (t >= spec.sink + indexed)]


def in_order(store: Store, row: int, length: int, indexed: int, spec: Spec) -> tuple[Tensor, Tensor]:
    """Keys and values of a row as they came, `[t, G, D]`."""
    tokens = store.tokens[row, :, :indexed].long()
    heads = torch.arange(len(tokens), device=tokens.device)[:, None]
    kept = steady_positions(length, indexed, spec, tokens.device)
    at = places(kept, spec)

    def whole(clustered: Tensor, steady: Tensor) -> Tensor:
        x = steady.new_empty(length, steady.shape[1], steady.shape[3])
        x[tokens, heads] = clustered[row, :, :indexed].to(x.device)
        x[kept] = steady[row, :, at].transpose(0, 1)
        return x

    return whole(store.k, store.k_steady), whole(store.v, store.v_steady)


def token_order(store: Store, row: int, length: int, indexed: int, spec: Spec) -> Row:
    tokens = store.tokens[row, :, :indexed].long()
    labels = torch.zeros_like(tokens)
    slots = torch.arange(store.offsets.shape[2] - 1, device=store.k.device)
    for g, sizes in enumerate(store.sizes[row].long()):
        labels[g, tokens[g] - spec.sink] = slots.repeat_interleave(sizes)
    return Row(*in_order(store, row, length, indexed, spec), labels)


def regrouped(row: Row, clusters: int, spec: Spec, int8: bool) -> reference.Index:
    """The meta index that the row's grouping implies, from its tokens in the accumulation dtype; `int8`: rounded."""
    kept = reference.empty_index(row.k).centroids.new_zeros(clusters, row.k.shape[2])
    part = slice(spec.sink, spec.sink + row.labels.shape[1])
    keys, values = (x[part].unbind(1) for x in (row.k, row.v))
    heads = [reference.summarise(*x, kept, int8) for x in zip(keys, values, row.labels, strict=True)]
    return reference.Index(row.labels, *(torch.stack(x) for x in zip(*heads, strict=True)))


def counts(store: Store) -> list[list[int]]:
    """Tokens, indexed ones, clusters and the two budgets of each row."""
    return torch.stack([store.lengths, store.indexed, store.clusters, *store.budgets.unbind(1)], 1).tolist()


def attend(q: Tensor, store: Store, query: Query, spec: Spec, cache: Cache | None = None) -> Attended:
    """Each row by the reference. The stored centroids, value means and radii stay unread, so they are tested too.

    A `cache` is served, but not read.
    """
    store = store._replace(k=store.k.to(q.device), v=store.v.to(q.device))
    out, acc = torch.zeros_like(q), torch.promote_types(q.dtype, torch.float32)
    lse, lower, upper = (torch.zeros(q.shape[:2], dtype=acc, device=q.device) for _ in range(3))
    lse += -torch.inf
    chosen = torch.full((*store.k.shape[:2], query.k_slots), -1, dtype=torch.int32, device=q.device)
    int8 = store.centroids.dtype == torch.int8
    for b, (length, indexed, clusters, k, e) in enumerate(counts(store)):
        if length == 0:
            continue
        row = token_order(store, b, length, indexed, spec)
        found = reference.wave_attention(
            q[b], row.k, row.v, regrouped(row, clusters, spec, int8), options(spec), scale=query.scale,
            retrieval_ratio=k / max(clusters, 1), estimation_ratio=e / max(clusters, 1), estimation=query.estimation,
            group_reduce=query.reduce, weight_by_size=query.weight_by_size, max_error=query.max_error or None,
        )  # fmt: skip
        out[b], lse[b], lower[b], upper[b] = found.out, found.lse, found.lower, found.upper
        for g, mask in enumerate(found.retrieved):
            slots = mask.nonzero()[:, 0]
            chosen[b, g, : len(slots)] = slots
    if cache is not None:
        serve(chosen, store, cache)
    return Attended(out, lse, chosen, lower if query.bounds else None, upper if query.bounds else None)


def select(
    q: Tensor, store: Store, query: Query, spec: Spec, selector: str, budget: float, seed: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row by the reference's selectors, as `attend`; and the tokens read, `[B, G, width]`."""
    out, acc = torch.zeros_like(q), torch.promote_types(q.dtype, torch.float32)
    found = torch.zeros(*store.k.shape[:2], width, dtype=torch.bool, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=acc, device=q.device)
    int8 = store.centroids.dtype == torch.int8
    for b, (length, indexed, clusters, _, e) in enumerate(counts(store)):
        if length:
            row = token_order(store, b, length, indexed, spec)
            out[b], lse[b], seen = reference.select_attention(
                q[b], row.k, row.v, regrouped(row, clusters, spec, int8), options(spec), selector=selector,
                budget=budget, scale=query.scale, estimation_ratio=e / max(clusters, 1), estimation=query.estimation,
                group_reduce=query.reduce, seed=seed,
            )  # fmt: skip
            if width:
                found[b, :, :length] = seen
    return out, lse, found


def read_slots(chosen: Tensor, store: Store, spec: Spec, width: int) -> Tensor:
    """bool `[B, G, width]`, by position: the tokens read where the clusters `chosen [B, G, K]` are, -1 aside."""
    found = torch.zeros(*chosen.shape[:2], width, dtype=torch.bool, device=chosen.device)
    for b, (length, indexed, *_) in enumerate(counts(store)):
        row = token_order(store, b, length, indexed, spec)
        found[b, :, steady_positions(length, indexed, spec, found.device)] = True
        for g, labels in enumerate(row.labels):
            found[b, g, spec.sink : spec.sink + indexed] = torch.isin(labels, chosen[b, g])
    return found


class Request(NamedTuple):
    """The pages that a step asks of one cache, by id."""

    vectors: dict[int, int]
    first: dict[int, int]  # first vector in `Store.k`


def request(chosen: Tensor, offsets: Tensor, page: int) -> Request:
    """The pages of the clusters `chosen [K]`, -1 aside, that lie at `offsets [C + 1]`."""
    found, bounds = Request({}, {}), offsets.tolist()
    for c in chosen[chosen >= 0].tolist():
        pages = cluster_pages(c, bounds[c], bounds[c + 1] - bounds[c], page)
        found.vectors.update(pages)
        found.first.update({x: bounds[c] + i * page for i, x in enumerate(pages)})
    return found


def serve(chosen: Tensor, store: Store, cache: Cache) -> None:
    """A step of the wave buffer for the clusters `chosen [B, G, K]`: each cache by the plain model of its policy."""
    heads = [(b, g) for b in range(chosen.shape[0]) for g in range(chosen.shape[1])]
    requests = [request(chosen[at], store.offsets[at], cache.page) for at in heads]
    check_fits(torch.tensor([len(r.vectors) for r in requests]).view(chosen.shape[:2]), cache)
    for at, asked in zip(heads, requests, strict=True):
        model = _model(cache, at)
        held = set(model.pages)
        places = model.step(asked.vectors)
        for x in asked.vectors.keys() - held:
            source = slice(asked.first[x], asked.first[x] + asked.vectors[x])
            for host, copy in ((store.k, cache.k), (store.v, cache.v)):
                copy[at][places[x], : asked.vectors[x]] = host[at][source]
        _keep(model, cache, at, set(places.values()))


def _model(cache: Cache, at: tuple[int, int]) -> PolicyModel:
    model = PolicyModel(cache.capacity, cache.policy, cache.vector_bytes)
    model.pages = [None if x < 0 else x for x in cache.pages[at].tolist()]
    model.used = [min(x, 1) if cache.policy == "clock" else x for x in cache.used[at].tolist()]
    model.hand, model.steps = int(cache.hand[at]), int(cache.steps[at])
    model.hits, model.misses, model.evictions, model.bytes = cache.counters[at].tolist()
    return model


def _keep(model: PolicyModel, cache: Cache, at: tuple[int, int], touched: set[int]) -> None:
    used = zip(model.used, cache.used[at].tolist(), strict=True)
    steps = [model.steps if i in touched else old if bit else 0 for i, (bit, old) in enumerate(used)]
    pages = [-1 if x is None else x for x in model.pages]
    slot_map = [-1] * cache.slot_map.shape[2]
    for place, x in enumerate(model.pages):
        if x is not None:
            slot_map[x] = place
    counters = [model.hits, model.misses, model.evictions, model.bytes]
    tables = (cache.slot_map, slot_map), (cache.pages, pages), (cache.used, steps), (cache.counters, counters)
    for table, values in tables:
        table[at] = torch.tensor(values, dtype=table.dtype)
    cache.hand[at], cache.steps[at] = model.hand, model.steps
