"""RetroInfer from GPU kernels, in the order a decode step or a clustering needs them: `portable.py`'s functions.

Launches follow from shapes alone and nothing is read on the host, so a decode step can be captured in a CUDA graph.
"""

from functools import partial

import torch
from torch import Tensor

from . import portable_kmeans
from .assign import assign
from .buffer import Cache
from .estimate import estimate
from .exact import Cached, exact
from .merge import merge
from .portable_attend import Meta, Zone, adaptive, best, members, neglected, weigh
from .score import Scores, score
from .select import select
from .spec import Attended, Plan, Query, Spec, Store
from .update import update


@torch.no_grad()
def attend(q: Tensor, store: Store, query: Query, spec: Spec, cache: Cache | None = None) -> Attended:
    """Attention of `q [B, Hq, D]`, the newest token of each row; with a `cache`, members are read through it."""
    with torch.cuda.device_of(q):
        q = q if q.stride(-1) == 1 else q.contiguous()
        scored = score(q, store, query)
        kv_heads = store.k.shape[1]
        wanted = store.budgets[:, :1].expand(-1, kv_heads)
        bounded = query.bounds or query.max_error > 0
        meta = _meta(q, scored, store, query) if bounded else None
        if meta is not None and query.max_error > 0:
            nothing = select(scored, store, query, torch.zeros_like(scored.ranks[..., 0]))
            steady = merge(q, exact(q, store, nothing, spec, query.scale), None, scored, store)[2]
            order = best(scored.ranks.long(), meta.live, scored.ranks.shape[2])
            enough = adaptive(meta, steady.view(meta.total.shape), order, query.max_error)
            wanted = torch.maximum(wanted, enough.int())
        zones = select(scored, store, query, wanted)
        read = exact(q, store, zones, spec, query.scale, None if cache is None else _fetch(zones.chosen, store, cache))
        guessed = None if query.estimation == "none" else estimate(scored, store, zones)
        out, lse, exact_lse = merge(q, read, guessed, scored, store)
        if meta is None or not query.bounds:
            return Attended(out, lse, zones.chosen, None, None)
        chosen = members(Zone.of(zones.chosen.long(), zones.chosen >= 0), meta.live)
        lower, upper = neglected(meta, chosen, exact_lse.view(meta.total.shape))
        return Attended(out, lse, zones.chosen, lower.view(lse.shape), upper.view(lse.shape))


def _fetch(chosen: Tensor, store: Store, cache: Cache) -> Cached:
    if chosen.is_cuda:
        from ..cuda.retroinfer import serve
    else:  # interpreted
        from .buffer_portable import serve
    serve(chosen, store, cache)
    return Cached(cache.slot_map, cache.k, cache.v)


def _meta(q: Tensor, scored: Scores, store: Store, query: Query) -> Meta:
    """What bounds are made of, for all slots there is room for."""
    sizes = store.sizes
    scores = scored.scores.masked_fill((sizes == 0)[:, :, None], -torch.inf)
    return weigh(q.float().view(*scored.total.shape, q.shape[2]), scores, sizes, store, query)


def kmeans(k: Tensor, plan: Plan, spec: Spec) -> Tensor:
    """Labels `[G, n]` int32 of keys `[n, G, D]`: slots of the call, -1 outside the plan."""
    fit = partial(portable_kmeans.lloyd, best=assign, refine=update)
    with torch.cuda.device_of(k):
        return portable_kmeans.kmeans(k, plan, spec, fit, assign)
