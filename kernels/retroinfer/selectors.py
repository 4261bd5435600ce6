"""What a row would give if other units of it were read, at one token budget: masks over all scores, to compare quality.

A unit is a token (`oracle`, `random`), a page of consecutive tokens (`quest`) or a cluster (`cluster`, `wave`).
"""

import torch
from torch import Tensor

from .portable_attend import softmax_state
from .reads import draws, slots_of, tokens_read
from .spec import Query, Spec, Store, cdiv, from_int8, steady

PAGE = 16  # indexed tokens of a page; the last one may have fewer


def attend(
    q: Tensor, store: Store, query: Query, spec: Spec, selector: str, budget: float, seed: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, Hq, D]` and `lse [B, Hq]` over the steady zone and a share `budget` of each row's tokens.

    Units are taken whole, in the order of their scores, up to the first that does not fit, and one at least. `wave`
    estimates the next clusters as well, as many as `store.budgets` say; `full` reads everything; `random` orders tokens
    by the draws of `seed`. The third is `tokens_read [B, G, width]`.
    """
    dtype, heads, device = q.dtype, store.k.shape[1], q.device
    q = (q.to(torch.promote_types(dtype, torch.float32)) * query.scale).unflatten(1, (heads, -1))  # [B, G, r, D]
    live = (torch.arange(store.k.shape[2], device=device) < store.indexed[:, None, None]).expand(-1, heads, -1)
    sizes = store.sizes
    members, clusters = _scores(q, store.k, live), _scores(q, from_int8(store.centroids, store.steps, 0), sizes > 0)
    logits, read, estimated = members, live, torch.zeros_like(sizes, dtype=torch.bool)
    if selector != "full":
        unit, size, logits = _units(q, store, spec, selector, members, clusters)
        if selector == "random":
            order = _drawn(draws(seed, heads, store.lengths, size.shape[2]), size > 0)
        else:
            order = _order(logits, size > 0, query.reduce)
        room = (budget * store.lengths.double() + 0.5).floor().clamp(min=1)[:, None, None]
        count = (size.gather(2, order).cumsum(2) <= room).sum(2, keepdim=True).clamp(min=1)
        place = torch.empty_like(order)
        place.scatter_(2, order, torch.arange(order.shape[2], device=device).expand_as(order))
        read = (place < count).gather(2, unit) & live
        if selector == "wave":
            more = store.budgets[:, 1, None, None]
            estimated = (place >= count) & (place < count + more) & (sizes > 0)
    held = steady(store.lengths, store.indexed, spec)[:, None].expand(-1, heads, -1)
    bias = sizes.to(q.dtype).clamp(min=1).log()[:, :, None]
    seen = torch.cat([held, read, estimated], 2)
    values = (store.v_steady, store.v, from_int8(store.value_means, store.steps, 1))
    out, lse = softmax_state(
        torch.cat([_scores(q, store.k_steady, held), _masked(members, read), _masked(clusters + bias, estimated)], 3),
        torch.cat([x.to(q.dtype) for x in values], 2).masked_fill_(~seen[..., None], 0),  # 0 * NaN is NaN
    )
    trace = torch.where(store.indexed[:, None, None] > 0, logits.logsumexp(-1) * 0, 0)  # NaN of any unit shows
    found = tokens_read(read, store, spec, width)
    return (out + trace[..., None]).flatten(1, 2).to(dtype), (lse + trace).flatten(1, 2), found


def _units(
    q: Tensor, store: Store, spec: Spec, selector: str, members: Tensor, clusters: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The unit of each member `[B, G, N]`, the units' sizes `[B, G, U]` and logits `[B, G, r, U]`."""
    batch, heads, places = store.tokens.shape
    if selector in ("cluster", "wave"):
        return slots_of(store), store.sizes, clusters
    # Members by position; unused places come behind them.
    live = torch.arange(places, device=q.device) < store.indexed[:, None, None]
    token = torch.where(live, store.tokens.long() - spec.sink, torch.arange(places, device=q.device))
    if selector in ("oracle", "random"):
        logits = torch.full_like(members, -torch.inf).scatter(3, token[:, :, None].expand_as(members), members)
        return token, live.int().expand(-1, heads, -1), logits
    count = cdiv(places, PAGE)
    keys = torch.zeros(batch, heads, count * PAGE, q.shape[3], dtype=q.dtype, device=q.device)
    keys = keys.scatter(2, token[..., None].expand_as(store.k), store.k.to(q.dtype)).unflatten(2, (count, PAGE))
    used = (torch.arange(count * PAGE, device=q.device) < store.indexed[:, None]).view(batch, 1, count, PAGE, 1)
    low, high = (keys.masked_fill(~used, end).aminmax(dim=3)[i] for i, end in enumerate((torch.inf, -torch.inf)))
    size = used.sum((3, 4)).expand(-1, heads, -1)
    low, high = (x.masked_fill((size == 0)[..., None], 0).transpose(2, 3) for x in (low, high))
    return token // PAGE, size, _masked(q.clamp(min=0) @ high + q.clamp(max=0) @ low, size > 0)


def _scores(q: Tensor, keys: Tensor, present: Tensor) -> Tensor:
    return _masked(q @ keys.to(q.dtype).transpose(2, 3), present)


def _masked(logits: Tensor, present: Tensor) -> Tensor:
    return logits.masked_fill(~present[:, :, None], -torch.inf)


def _order(logits: Tensor, present: Tensor, reduce: str) -> Tensor:
    """Units by falling score, `[B, G, U]`: NaN first, ties to the lowest, absent ones last. A mean ranks as a sum."""
    shares = logits.log_softmax(-1)
    scores = shares.amax(2) if reduce == "max" else shares.logsumexp(2)
    return scores.masked_fill(~present, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _drawn(numbers: Tensor, present: Tensor) -> Tensor:
    """Units by falling draw, `[B, G, U]`, absent ones last."""
    return numbers.masked_fill(~present, -1).argsort(dim=-1, descending=True, stable=True)
