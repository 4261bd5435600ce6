"""One decode step of RetroInfer in plain PyTorch: rank the clusters, read three zones, merge.

Only what a zone holds is gathered, so values elsewhere never count, not even as 0 * NaN. Rows differ in length: a list
is as wide as the longest needs, and a place past its end repeats the first one under a mask. How wide that is is read
on the host.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..states.portable_merge import merge_pair
from .buffer import Cache
from .buffer_portable import cached, serve
from .spec import Attended, Query, Spec, Store, places

State = tuple[Tensor, Tensor]
_BELOW = torch.iinfo(torch.int64).min  # ranks under every score, NaN and -inf included
_LOW = 0x7FFFFFFF


class Meta(NamedTuple):
    """The clusters as a query sees them; -inf where a slot is empty."""

    scores: Tensor  # [B, G, r, C] scaled logits of the centroids
    low: Tensor  # the least logarithm of mass a cluster can have,
    high: Tensor | None  # and the most, if asked for
    weight: Tensor  # logarithm of the mass if all members' keys were the centroid
    total: Tensor  # [B, G, r] logsumexp of the scores
    live: Tensor  # [B, G, C]


class Zone(NamedTuple):
    """Some slots or tokens of each head, `[B, G, n]`, those where `seen`."""

    index: Tensor
    seen: Tensor

    @classmethod
    def of(cls, index: Tensor, seen: Tensor) -> "Zone":
        """Without what is not seen: a place that is not shows the first one that is."""
        if not index.shape[-1]:
            return cls(index, seen)
        first = index.gather(-1, seen.int().argmax(-1, keepdim=True))
        return cls(torch.where(seen, index, first).clamp(min=0), seen)


@torch.no_grad()
def attend(
    q: Tensor, store: Store, query: Query, spec: Spec, chosen: Tensor | None = None, cache: Cache | None = None
) -> Attended:
    """Attention of `q [B, Hq, D]`, the newest token of each row; `chosen [B, G, K]` replays a retrieval zone.

    With a `cache` the retrieval zone is read through it.
    """
    (rows, hq, dim), kv_heads = q.shape, store.k.shape[1]
    acc = torch.promote_types(q.dtype, store.radius.dtype)
    grouped = q.to(acc).view(rows, kv_heads, hq // kv_heads, dim)
    meta = look(grouped, store, query)
    exact = steady_state(grouped, store, spec, query.scale)
    k, e = store.budgets.long()[:, None, :].expand(-1, kv_heads, -1).unbind(-1)
    e = {"ratio": e, "all": torch.full_like(e, meta.live.shape[-1]), "none": torch.zeros_like(e)}[query.estimation]
    if chosen is None:
        everything = query.max_error > 0
        width = meta.live.shape[-1] if everything else int((k + e).max())
        order = rank(ranking(meta, query), meta.live, width)
        k = torch.maximum(k, adaptive(meta, exact[1], order, query.max_error)) if everything else k
        k = k.clamp(max=query.k_slots)
        read = zone(order, torch.zeros_like(k), k)
    else:
        read = Zone.of(chosen.long(), chosen >= 0)
        order = rank(ranking(meta, query), meta.live & ~members(read, meta.live), int(e.max()))
        k = torch.zeros_like(k)
    slots = ascending(read, query.k_slots)
    if cache is not None:
        serve(slots, store, cache)
    exact = merge_pair(exact, retrieved_state(grouped, store, read, query.scale, cache))
    out, lse = merge_pair(exact, estimated_state(meta, store, zone(order, k, k + e)))
    trace = torch.where(meta.live.any(-1, keepdim=True), meta.total, 0.0) * 0
    out, lse = (out + trace[..., None]).to(q.dtype), lse + trace
    bounds = neglected(meta, members(read, meta.live), exact[1]) if query.bounds else (None, None)
    shaped = (None if x is None else x.view(rows, hq) for x in (lse, *bounds))
    lse, lower, upper = shaped
    return Attended(out.view(q.shape), lse, slots, lower, upper)


def look(q: Tensor, store: Store, query: Query) -> Meta:
    """Scores of `q [B, G, r, D]` against all centroids in use."""
    most = int(store.clusters.max())
    sizes = store.offsets[..., : most + 1].diff(dim=-1)
    centroids, live = store.centroids[:, :, :most].to(q.dtype), sizes > 0
    products = torch.bmm(centroids.flatten(0, 1), (q * query.scale).flatten(0, 1).mT)  # tall is faster than wide
    scores = products.mT.contiguous().view(*q.shape[:3], most)
    if store.centroids.dtype == torch.int8:
        scores *= store.steps[:, :, None, :most, 0].to(q.dtype)
    scores += torch.zeros_like(live, dtype=q.dtype).masked_fill_(~live, -math.inf)[:, :, None]
    return weigh(q, scores, sizes, store, query)


def weigh(q: Tensor, scores: Tensor, sizes: Tensor, store: Store, query: Query) -> Meta:
    """What `scores [B, G, r, C]` of the first slots, `sizes [B, G, C]`, -inf where empty, say of the clusters."""
    most, live = sizes.shape[-1], sizes > 0
    total = scores.logsumexp(-1)
    weight = scores + sizes.to(q.dtype).clamp_(min=1).log_()[:, :, None]
    if not (query.bounds or query.max_error > 0):
        return Meta(scores, weight, None, weight, total, live)
    reach = abs(query.scale) * torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    low = weight
    if store.centroids.dtype != q.dtype:  # a rounded centroid is not the mean that Jensen's inequality speaks of
        if store.centroids.dtype == torch.int8:
            slack = store.steps[:, :, :most, 0].to(q.dtype) * (math.sqrt(q.shape[3]) / 2)
        else:
            norm = torch.linalg.vector_norm(store.centroids[:, :, :most].to(q.dtype), dim=-1)
            slack = norm * (torch.finfo(store.centroids.dtype).eps / 2)
        low = weight - reach * slack[:, :, None]
    return Meta(scores, low, weight + reach * store.radius[:, :, None, :most], weight, total, live)


def ranking(meta: Meta, query: Query) -> Tensor:
    """One score for each cluster and group, `[B, G, C]`: shares of the softmax, reduced, as logarithms."""
    x, total = (meta.weight, meta.weight.logsumexp(-1)) if query.weight_by_size else (meta.scores, meta.total)
    shares = x - total[..., None]
    if query.reduce == "max" or shares.shape[2] == 1:
        return shares.amax(2)
    score = shares.logsumexp(2)
    return score - math.log(shares.shape[2]) if query.reduce == "mean" else score


def rank(scores: Tensor, live: Tensor, count: int) -> Tensor:
    """The `count` best live slots `[B, G, count]`, then -1: falling score, NaN first, ties to the lowest."""
    count = min(count, scores.shape[-1])
    scores = scores.masked_fill(scores.isnan(), math.nan) + 0.0  # one NaN, one zero
    small = scores.dtype == torch.float32
    bits = scores.view(torch.int32 if small else torch.int64)
    ranks = (bits ^ ((bits >> (31 if small else 63)) & torch.iinfo(bits.dtype).max)).long()
    if not small:
        ranks, order = ranks.masked_fill(~live, _BELOW).sort(dim=-1, descending=True, stable=True)
        return order.masked_fill(ranks == _BELOW, -1)[..., :count]
    return best(ranks, live, count)


def best(ranks: Tensor, live: Tensor, count: int) -> Tensor:
    """The `count` live slots `[B, G, count]` of the highest ranks (int32's, as int64), ties to the lowest, then -1."""
    keys = (ranks << 32) | (_LOW - torch.arange(ranks.shape[-1], device=ranks.device))
    keys = keys.masked_fill(~live, _BELOW)
    if count < ranks.shape[-1]:
        keys = keys.topk(count, dim=-1).values
    else:
        keys = keys.sort(dim=-1, descending=True).values
    return (_LOW - (keys & _LOW)).masked_fill(keys == _BELOW, -1)


def zone(order: Tensor, begin: Tensor, end: Tensor) -> Zone:
    """Places `begin` to `end [B, G]` of an order."""
    first, last = int(begin.min()), min(int(end.max()), order.shape[-1])
    part, place = order[..., first:last], torch.arange(first, last, device=order.device)
    return Zone.of(part, (place >= begin[..., None]) & (place < end[..., None]) & (part >= 0))


def members(zone: Zone, like: Tensor) -> Tensor:
    """The slots of a zone as a mask `[B, G, C]`."""
    counts = torch.zeros(like.shape, dtype=torch.int32, device=like.device)
    return counts.scatter_add_(2, zone.index, zone.seen.int()) > 0


def ascending(zone: Zone, width: int) -> Tensor:
    """The slots of a zone in memory's order, -1 behind, `[B, G, width]` int32."""
    slots = zone.index.masked_fill(~zone.seen, _LOW).sort(dim=-1).values.int()[..., :width]
    chosen = torch.full((*slots.shape[:2], width), -1, dtype=torch.int32, device=slots.device)
    chosen[..., : slots.shape[-1]] = slots.masked_fill(slots == _LOW, -1)
    return chosen


def adaptive(meta: Meta, steady: Tensor, order: Tensor, max_error: float) -> Tensor:
    """How many clusters of each order, `[B, G]`, leave at most a share `max_error` of every query head's mass."""
    seen = (order >= 0)[:, :, None]
    ranked = order.clamp(min=0)[:, :, None].expand_as(meta.low)
    low, high = (x.gather(3, ranked).masked_fill(~seen, -math.inf) for x in (meta.low, meta.high))
    edge = torch.full_like(steady[..., None], -math.inf)
    gained = torch.cat([steady[..., None], low], -1).logcumsumexp(-1)
    left = torch.cat([edge, high.flip(-1)], -1).logcumsumexp(-1).flip(-1)
    enough = left + math.log1p(-max_error) <= gained + math.log(max_error)
    enough[..., -1] = True
    return enough.all(2).int().argmax(-1)


def neglected(meta: Meta, read: Tensor, exact: Tensor) -> State:
    """Bounds of the share of mass that was not read, `[B, G, r]` each."""
    unread = (meta.live & ~read)[:, :, None]
    totals = (x.masked_fill(~unread, -math.inf).logsumexp(-1) for x in (meta.low, meta.high))
    lower, upper = ((x - exact).sigmoid_().masked_fill_(x == -math.inf, 0.0) for x in totals)
    return lower, upper


def steady_state(q: Tensor, store: Store, spec: Spec, scale: float) -> State:
    """Attention over the tokens of each row that are not indexed."""
    count = store.lengths - store.indexed
    steps = torch.arange(int(count.max()), device=q.device)
    late = steps + store.indexed[:, None] * (steps >= spec.sink)
    at = places(late, spec)[:, None].expand(-1, q.shape[1], -1)
    tokens = Zone.of(at, (steps < count[:, None])[:, None].expand_as(at))
    return token_state(q, store.k_steady, store.v_steady, tokens, scale)


def retrieved_state(q: Tensor, store: Store, read: Zone, scale: float, cache: Cache | None = None) -> State:
    """Attention over the members of the clusters in `read`."""
    starts = store.offsets.gather(2, read.index)
    sizes = (store.offsets.gather(2, read.index + 1) - starts).masked_fill_(~read.seen, 0)
    ends = sizes.cumsum(-1)
    count = ends[..., -1:] if ends.shape[-1] else ends.sum(-1, keepdim=True)
    steps = torch.arange(int(count.max()), device=q.device).expand(*count.shape[:2], -1).contiguous()
    which = torch.searchsorted(ends, steps, right=True).clamp_(max=max(ends.shape[-1] - 1, 0))
    at, k, v = steps + (starts - ends + sizes).gather(2, which), store.k, store.v
    if cache is not None:
        at = cached(at, read.index.gather(2, which), starts.gather(2, which), cache)
        k, v = cache.k.flatten(2, 3), cache.v.flatten(2, 3)
    return token_state(q, k, v, Zone.of(at, steps < count), scale)


def estimated_state(meta: Meta, store: Store, guessed: Zone) -> State:
    """Clusters as if each member's key were the centroid and its value the mean."""
    index = guessed.index[:, :, None].expand(-1, -1, meta.weight.shape[2], -1)
    scores = meta.weight.gather(3, index).masked_fill_(~guessed.seen[:, :, None], -math.inf)
    means = take(store.value_means, guessed.index).to(scores.dtype)
    if store.value_means.dtype == torch.int8:
        means *= store.steps[..., 1].gather(2, guessed.index)[..., None]
    return softmax_state(scores, means)


def token_state(q: Tensor, k: Tensor, v: Tensor, tokens: Zone, scale: float) -> State:
    """Attention of `q [B, G, r, D]` over some of `k, v [B, G, n, D]`."""
    scores = (q * scale) @ take(k, tokens.index).to(q.dtype).mT
    return softmax_state(scores.masked_fill_(~tokens.seen[:, :, None], -math.inf), take(v, tokens.index).to(q.dtype))


def take(x: Tensor, index: Tensor) -> Tensor:
    """`x [B, G, n, D]` at `index [B, G, m]`."""
    lead = torch.arange(index.shape[0] * index.shape[1], device=x.device).view(*index.shape[:2], 1)
    rows = (index + lead * x.shape[2]).flatten()
    return x.view(-1, x.shape[3]).index_select(0, rows).view(*index.shape, x.shape[3])


def softmax_state(scores: Tensor, values: Tensor) -> State:
    """The state of `scores [B, G, r, n]` over `values [B, G, n, D]`; of nothing but -inf: 0 and -inf."""
    if not scores.shape[-1]:
        return scores @ values, scores.new_full(scores.shape[:-1], -math.inf)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill_(top == -math.inf, 0.0)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0  # values nobody sees may be NaN
    out = (weights @ values).div_(total.masked_fill(nothing, 1.0)).masked_fill_(nothing, 0.0)
    return out, (total.log() + top)[..., 0]
