"""RetroInfer (arXiv 2505.02922): an index of clusters over one row's keys, and decode attention in three zones.

One row at a time: `k, v [t, g, d]` in token order, `q [h, d]` the query of the newest token. Legend: `t` tokens, `g` KV
heads, `h = g r` query heads, `n` clusters, `d` head size. Tokens `sink .. sink + indexed - 1` are indexed, each KV head
on its own; the others are the steady zone. With `q` scaled, clusters `i` of `s_i` keys, and the numbering of this page:

    (1)  label(k) = argmax_i (k - mean) . u_i,  u_i the direction of the sum of the cluster's keys minus their mean
    (2)  c_i = mean of the members' keys,  VS_i = sum of their values,  r_i = max |k - c_i|
    (3)  rank_i = sum over a group's heads of softmax_i(q . c)
    (4)  out = sum_i exp(q . c_i) VS_i / sum_i s_i exp(q . c_i),  lse = log sum_i s_i exp(q . c_i)
    (5)  s_i exp(q . c_i)  <=  sum over members of exp(q . k)  <=  s_i exp(q . c_i + |q| r_i)
"""

import math
from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from .states import State, accumulation_dtype, masked_attention, merge_states


class Options(NamedTuple):
    """How a row is indexed. `max_cluster`: larger clusters are split; `update_every`: tokens that wait for a call."""

    sink: int = 4
    local: int = 64
    segment: int = 8192
    tokens_per_cluster: int = 16
    iterations: int = 10
    final_pass: str = "segment"
    max_cluster: int | None = None
    update_every: int = 1024


class Index(NamedTuple):
    """The meta index of a row, and who is in which cluster. An empty cluster has size 0 and takes part in nothing."""

    labels: Tensor  # [g, indexed] int64, the cluster of each indexed token
    centroids: Tensor  # [g, n, d] mean of the members' keys
    value_sums: Tensor  # [g, n, d]
    sizes: Tensor  # [g, n] int32
    radius: Tensor  # [g, n] largest distance of a member to the centroid
    slack: Tensor  # [g, n] largest distance the mean key can have to the centroid: 0 unless it was rounded

    @property
    def indexed(self) -> int:
        return self.labels.shape[1]

    def members(self) -> Tensor:
        """Indexed tokens in cluster order, `[g, indexed]`, ascending in a cluster; 0 is the first indexed one."""
        return self.labels.argsort(dim=-1, stable=True)


class Result(NamedTuple):
    """`retrieved, estimated [g, n]`: the clusters of the two zones. `lower, upper [h]` bound the share of the attention
    mass that was not read exactly."""

    out: Tensor  # [h, d]
    lse: Tensor  # [h]
    retrieved: Tensor
    estimated: Tensor
    lower: Tensor
    upper: Tensor


def segments(tokens: int, options: Options) -> list[int]:
    """Lengths of the segments of `tokens` consecutive tokens: full ones, then what is left."""
    full, rest = divmod(tokens, options.segment)
    return [options.segment] * full + [rest] * (rest > 0)


def slots(tokens: int, options: Options) -> int:
    """Clusters that one clustering call over `tokens` adds. Known from the length alone, so the same for every head."""
    count = sum(math.ceil(t / options.tokens_per_cluster) for t in segments(tokens, options))
    return count + (tokens // options.max_cluster if options.max_cluster else 0)


def normalise(x: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Equation 1: the best centroid of each key by inner product; ties, and scores all NaN, go to the lowest."""
    return einsum(x, centroids, "t d, n d -> t n").argmax(-1)


def total(x: Tensor, labels: Tensor, count: int) -> Tensor:
    return torch.zeros(count, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, labels, x)


def iterate(x: Tensor, centroids: Tensor) -> Tensor:
    """One round: assign, then the direction of each cluster's sum. A cluster without one keeps its centroid."""
    sums = total(x, assign(x, centroids), len(centroids))
    return torch.where(sums.norm(dim=-1, keepdim=True) > 0, normalise(sums), centroids)


def segmented_kmeans(k: Tensor, options: Options) -> State:
    """The paper's segmented clustering of one head's keys `[t, d]`: labels `[t]` and the centroids `[n, d]` they chose.

    Spherical k-means of keys minus their mean. A segment starts from evenly strided keys; of `iterations` assignments
    the last is the final pass, over its own centroids or all. Clusters over `max_cluster` are split in token order.
    """
    k = k.to(accumulation_dtype(k))
    mean = k.mean(0)
    parts = (k - mean).split(segments(len(k), options))
    found: list[Tensor] = []
    for x in parts:
        count = math.ceil(len(x) / options.tokens_per_cluster)
        step = 2 * torch.arange(count, device=k.device) + 1
        centroids = normalise(x[step * len(x) // (2 * count)])
        for _ in range(options.iterations - 1):
            centroids = iterate(x, centroids)
        found.append(centroids)
    centroids = torch.cat(found)
    if options.final_pass == "global":
        labels = assign(k - mean, centroids)
    else:
        first = torch.tensor([0, *map(len, found)]).cumsum(0).tolist()
        labels = torch.cat([assign(x, c) + start for x, c, start in zip(parts, found, first, strict=False)])
    centroids = centroids + mean
    return (labels, centroids) if options.max_cluster is None else split(labels, centroids, options.max_cluster)


def split(labels: Tensor, centroids: Tensor, most: int) -> State:
    """Cut each cluster in runs of at most `most` members, in token order; later clusters move up."""
    sizes = labels.bincount(minlength=len(centroids))
    pieces = (sizes + most - 1).div(most, rounding_mode="floor").clamp(min=1)
    order = labels.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[labels[order]]
    kept = centroids.repeat_interleave(pieces, 0)
    unused = kept.new_zeros(len(centroids) + len(labels) // most - len(kept), kept.shape[1])
    return (pieces.cumsum(0) - pieces)[labels] + place // most, torch.cat([kept, unused])


def summarise(k: Tensor, v: Tensor, labels: Tensor, kept: Tensor, int8: bool = False) -> tuple[Tensor, ...]:
    """Equation 2: all of an `Index` but the labels, of one head; an empty cluster keeps its row of `kept [n, d]`.

    `int8`: mean keys and values are those that 8 bits keep.
    """
    k, v = k.to(kept.dtype), v.to(kept.dtype)
    sizes = labels.bincount(minlength=len(kept))
    means = total(k, labels, len(kept)) / sizes.clamp(min=1)[:, None]
    centroids, sums, slack = torch.where(sizes[:, None] > 0, means, kept), total(v, labels, len(kept)), kept[:, 0] * 0
    if int8:
        centroids, step = rounded(centroids)
        slack = step * math.sqrt(kept.shape[1]) / 2
        sums = rounded(sums / sizes.clamp(min=1)[:, None])[0] * sizes[:, None]
    distance = (k - centroids[labels]).norm(dim=-1)
    radius = torch.zeros_like(kept[:, 0]).scatter_reduce_(0, labels, distance, "amax")
    return centroids, sums, sizes.int(), radius, slack


def rounded(x: Tensor) -> State:
    """Rows `x [n, d]` as int8 keeps them, in steps of the row's own, and the steps `[n]`: bfloat16, rounded up."""
    step = (x.abs().amax(-1) / 127 * (1 + 2**-8)).bfloat16().to(x.dtype)
    return (x / step.masked_fill(step == 0, 1)[:, None]).round().clamp(-127, 127) * step[:, None], step


def empty_index(k: Tensor) -> Index:
    _, g, d = k.shape
    none = torch.zeros(g, 0, d, dtype=accumulation_dtype(k), device=k.device)
    return Index(none[..., 0].long(), none, none, none[..., 0].int(), none[..., 0], none[..., 0])


def build_index(k: Tensor, v: Tensor, options: Options, labels: Tensor | None = None) -> Index:
    """Index all tokens but the first `sink` and the last `local`. `labels [g, t]` replays a grouping."""
    return _cluster(empty_index(k), k, v, options, labels)


def extend_index(index: Index, k: Tensor, v: Tensor, options: Options, labels: Tensor | None = None) -> Index:
    """The index after the row has grown to `k, v`, by a generated token or a new prompt part: the paper's index update.

    As soon as `update_every` tokens that are neither indexed nor local wait, all of them are clustered, in segments as
    a build does, and appended; earlier clusters stay as they are.
    """
    waiting = len(k) - options.sink - options.local - index.indexed
    return _cluster(index, k, v, options, labels) if waiting >= options.update_every else index


def _cluster(index: Index, k: Tensor, v: Tensor, options: Options, labels: Tensor | None) -> Index:
    window = slice(options.sink + index.indexed, len(k) - options.local)
    tokens = window.stop - window.start
    if tokens <= 0:
        return index
    heads = []
    for g in range(k.shape[1]):
        grouping, kept = segmented_kmeans(k[window, g], options)
        grouping = grouping if labels is None else labels[g]
        heads.append((grouping + index.sizes.shape[1], *summarise(k[window, g], v[window, g], grouping, kept)))
    new = (torch.stack(x) for x in zip(*heads, strict=True))
    return Index(*(torch.cat(x, 1) for x in zip(index, new, strict=True)))


def part(ratio: float, count: int) -> int:
    """A share of `count` clusters, rounded half up; at least one unless the ratio is 0."""
    return min(count, max(1, math.floor(ratio * count + 0.5))) if ratio > 0 else 0


def estimated_clusters(estimation: str, ratio: float, count: int) -> int:
    return {"ratio": part(ratio, count), "all": count, "none": 0}[estimation]


def rank(logits: Tensor, present: Tensor, kv_heads: int, group_reduce: str) -> Tensor:
    """Candidates by falling score, `[g, n]`, those not `present [g, n]` last; ties to the lowest, NaN first.

    A candidate's score (equation 3: a centroid's) is the softmax of `logits [h, n]` (-inf where not present), reduced
    over the group by `sum`, `mean` or `max`. It is kept as a logarithm: probabilities of far ones underflow and tie.
    """
    shares = rearrange(logits, "(g r) n -> g r n", g=kv_heads).log_softmax(-1)
    scores = shares.amax(1) if group_reduce == "max" else shares.logsumexp(1)
    if group_reduce == "mean":
        scores = scores - math.log(shares.shape[1])
    return scores.masked_fill(~present, -math.inf).argsort(dim=-1, descending=True, stable=True)


def first_of(order: Tensor, count: Tensor) -> Tensor:
    """A mask over candidates, `[g, n]`: the first `count [g]` of each order."""
    taken = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.zeros_like(taken).scatter_(1, order, taken)


def cluster_logits(q: Tensor, index: Index, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled scores of the centroids, and the logarithms of both sides of equation 5, `[h, n]` each.

    The least follows from Jensen's inequality, the most from the radius. All are -inf for an empty cluster.
    """
    group = q.shape[0] // index.sizes.shape[0]
    centroids, empty = (x.repeat_interleave(group, 0) for x in (index.centroids, index.sizes == 0))
    radius, slack = (x.repeat_interleave(group, 0) for x in (index.radius, index.slack))
    scores = (einsum(q, centroids, "h d, h n d -> h n") * scale).masked_fill(empty, -math.inf)
    weight, reach = cluster_weights(scores, index), abs(scale) * q.norm(dim=-1, keepdim=True)
    return scores, weight - reach * slack, weight + reach * radius


def cluster_weights(scores: Tensor, index: Index) -> Tensor:
    """Logarithm of each cluster's mass if all its keys were the centroid, `[h, n]`."""
    sizes = index.sizes.repeat_interleave(len(scores) // len(index.sizes), 0)
    return scores + sizes.to(scores.dtype).clamp(min=1).log()


def steady_zone(tokens: int, index: Index, options: Options) -> Tensor:
    """Mask `[t]` of the tokens that are not indexed."""
    t = torch.arange(tokens, device=index.labels.device)
    return (t < options.sink) | (t >= options.sink + index.indexed)


def exact_state(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> State:
    """Attention of `q [h, d]` over the tokens in `seen [g, t]`."""
    mask = repeat(seen, "g t -> 1 (g r) 1 t", r=q.shape[0] // k.shape[1])
    v = v.to(q.dtype).masked_fill(~rearrange(seen, "g t -> t g 1"), 0)  # 0 * NaN is NaN
    out, lse = masked_attention(q[None, None], k[None].to(q.dtype), v[None], mask, scale)
    return out[0, 0], lse[0, 0]


def estimated_state(weight: Tensor, index: Index, estimated: Tensor) -> State:
    """Equation 4: clusters `[g, n]` as if all keys were the centroid."""
    group = weight.shape[0] // len(estimated)
    mask = estimated.repeat_interleave(group, 0)
    means = (index.value_sums / index.sizes.clamp(min=1)[..., None]).repeat_interleave(group, 0)
    lse = weight.masked_fill(~mask, -math.inf).logsumexp(-1)
    weights = (weight - lse.masked_fill(lse == -math.inf, 0.0)[:, None]).exp()
    return einsum(weights.masked_fill(~mask, 0), means.masked_fill(~mask[..., None], 0), "h n, h n d -> h d"), lse


def token_mask(tokens: int, chosen: Tensor, options: Options) -> Tensor:
    """`chosen [g, indexed]` as a mask over all the row's tokens, `[g, t]`."""
    mask = torch.zeros(len(chosen), tokens, dtype=torch.bool, device=chosen.device)
    mask[:, options.sink : options.sink + chosen.shape[1]] = chosen
    return mask


def zone_states(
    q: Tensor, k: Tensor, v: Tensor, index: Index, options: Options, read: Tensor, estimated: Tensor, scale: float
) -> State:
    """The states of the steady, retrieval (`read [g, indexed]`) and estimation zone, `[3, h, d]` and `[3, h]`."""
    steady = steady_zone(len(k), index, options).expand(k.shape[1], -1)
    weight = cluster_weights(cluster_logits(q, index, scale)[0], index)
    outs, lses = zip(
        exact_state(q, k, v, steady, scale),
        exact_state(q, k, v, token_mask(len(k), read, options), scale),
        estimated_state(weight, index, estimated),
        strict=True,
    )
    return torch.stack(outs), torch.stack(lses)


def neglected(mass: Tensor, exact: Tensor) -> Tensor:
    """`mass` as a share of it and `exact`, both as logarithms; 0 of nothing at all."""
    return (mass - exact).sigmoid().masked_fill(mass == -math.inf, 0.0)


def adaptive(low: Tensor, high: Tensor, steady: Tensor, order: Tensor, max_error: float) -> Tensor:
    """How many clusters of each order, `[g]`, leave at most a share `max_error` of every query head's mass unread.

    Decided before any cluster is read: those retrieved count with their lowest mass, the others with their highest.
    """
    ranked = order.repeat_interleave(len(low) // len(order), 0)
    edge = torch.full_like(steady[:, None], -math.inf)
    gained = torch.cat([steady[:, None], low.gather(1, ranked)], 1).logcumsumexp(1)
    left = torch.cat([edge, high.gather(1, ranked).flip(1)], 1).logcumsumexp(1).flip(1)
    enough = left + math.log1p(-max_error) <= gained + math.log(max_error)
    enough[:, -1] = True
    return rearrange(enough, "(g r) n -> g r n", g=len(order)).all(1).int().argmax(1)


def wave_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Index,
    options: Options,
    *,
    scale: float | None = None,
    retrieval_ratio: float = 0.018,
    estimation_ratio: float = 0.232,
    estimation: str = "ratio",
    group_reduce: str = "sum",
    weight_by_size: bool = False,
    max_error: float | None = None,
) -> Result:
    """One decode step: the paper's tripartite attention. `max_error` lets the retrieval zone grow to meet the bound.

    A query head that meets a NaN or an infinity in any centroid is NaN, whether or not that cluster was chosen.
    """
    dtype = q.dtype
    q = q.to(accumulation_dtype(q))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    present, count = index.sizes > 0, index.sizes.shape[1]
    scores, low, high = cluster_logits(q, index, scale)
    order = rank(cluster_weights(scores, index) if weight_by_size else scores, present, len(present), group_reduce)
    wanted = torch.full_like(order[:, :1].sum(1), part(retrieval_ratio, count))
    if max_error is not None:
        steady = steady_zone(len(k), index, options).expand(k.shape[1], -1)
        wanted = wanted.maximum(adaptive(low, high, exact_state(q, k, v, steady, scale)[1], order, max_error))
    more = estimated_clusters(estimation, estimation_ratio, count)
    retrieved = first_of(order, wanted) & present
    estimated = first_of(order, wanted + more) & present & ~retrieved

    read = retrieved.gather(1, index.labels)
    outs, lses = zone_states(q, k, v, index, options, read, estimated, scale)
    exact = merge_states(outs[:2], lses[:2])[1]
    unread = (present & ~retrieved).repeat_interleave(len(q) // len(present), 0)
    lower, upper = (neglected(x.masked_fill(~unread, -math.inf).logsumexp(-1), exact) for x in (low, high))
    out, lse = poison(*merge_states(outs, lses), scores)
    return Result(out.to(dtype), lse, retrieved, estimated, lower, upper)


def poison(out: Tensor, lse: Tensor, scores: Tensor) -> State:
    """Let a NaN or an infinity among the clusters' scores show in the head that met it."""
    if scores.shape[1] == 0:
        return out, lse
    trace = scores.logsumexp(-1) * 0
    return out + trace[:, None], lse + trace


def select_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Index,
    options: Options,
    *,
    selector: str,
    budget: float,
    scale: float | None = None,
    estimation_ratio: float = 0.232,
    estimation: str = "ratio",
    group_reduce: str = "sum",
    page: int = 16,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Selectors at one token budget: `out [h, d]`, `lse [h]` and the tokens each KV head read, `[g, t]`.

    All read the steady zone, and a share `budget` of the row's tokens of the indexed ones: whole units by rank, as long
    as they fit, one at least. A unit is a token (`oracle`: ranked by its true score), a page of consecutive tokens
    (`quest`: by the largest score its minimum and maximum allow) or a cluster (`cluster`; `wave` estimates the next
    ones as well). `full` reads everything; `random` ranks tokens by a hash of `seed`, the KV head, the row's length and
    the position.
    """
    dtype = q.dtype
    q = q.to(accumulation_dtype(q))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group, count = len(q) // k.shape[1], index.sizes.shape[1]
    room = max(1, math.floor(budget * len(k) + 0.5))
    if selector in ("cluster", "wave"):
        unit, sizes, logits = index.labels, index.sizes, cluster_logits(q, index, scale)[0]
    else:
        keys = rearrange(k[options.sink : options.sink + index.indexed], "t g d -> g t d").to(q.dtype)
        width = page if selector == "quest" else 1
        unit = torch.arange(index.indexed, device=k.device).expand(len(keys), -1) // width
        sizes = torch.stack([x.bincount() for x in unit])
        pages = [x.aminmax(dim=1) for x in keys.repeat_interleave(group, 0).split(width, 1)] if index.indexed else []
        best = [torch.maximum(scale * q * low, scale * q * high).sum(-1) for low, high in pages]
        logits = torch.stack(best, -1) if best else q.new_zeros(len(q), 0)
    if selector == "random":
        order = hashed(seed, len(sizes), len(k), index.indexed, q.device).argsort(dim=-1, descending=True, stable=True)
    else:
        order = rank(logits, sizes > 0, len(sizes), group_reduce)
    fits = sizes.gather(1, order).cumsum(1) <= (index.indexed if selector == "full" else room)
    wanted = fits.sum(1).clamp(min=1)
    read = (first_of(order, wanted) & (sizes > 0)).gather(1, unit)
    estimated = torch.zeros_like(index.sizes, dtype=torch.bool)
    if selector == "wave":
        more = estimated_clusters(estimation, estimation_ratio, count)
        estimated = first_of(order, wanted + more) & ~first_of(order, wanted) & (sizes > 0)
    outs, lses = zone_states(q, k, v, index, options, read, estimated, scale)
    out, lse = poison(*merge_states(outs, lses), logits)
    seen = token_mask(len(k), read, options) | steady_zone(len(k), index, options)
    return out.to(dtype), lse, seen


def hashed(seed: int, heads: int, length: int, tokens: int, device: torch.device) -> Tensor:
    """32-bit numbers `[heads, tokens]` that look random: each argument and position stirred in with two multiplications
    modulo `2**32`."""
    word = torch.full((heads, tokens), seed, device=device)
    for value in (torch.arange(heads, device=device)[:, None], length, torch.arange(tokens, device=device)):
        word = (word ^ value) % 2**32
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            word = (word ^ word // 2**shift) * factor % 2**32
        word = word ^ word // 2**16
    return word
