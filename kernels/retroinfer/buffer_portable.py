"""One step of the wave buffer in plain PyTorch: look the chosen clusters' pages up, choose victims, fetch.

The policy walks no place: victims are ranked and taken together, with prefix sums. How many pages a step asks for, and
which of them it lacks, is read on the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .buffer import Cache, check_fits
from .spec import Store


class Request(NamedTuple):
    """The pages of a step, `[B, G, W]` by rising id, those where `asked`."""

    page: Tensor
    first: Tensor  # first vector in `Store.k`
    vectors: Tensor
    asked: Tensor


@torch.no_grad()
def serve(chosen: Tensor, store: Store, cache: Cache) -> None:
    """Bring the pages of the clusters `chosen [B, G, K]` (ascending, -1 behind) into the cache, in place.

    Raises ValueError, and changes nothing, where a head asks for more pages than its cache has places.
    """
    wanted = request(chosen, store, cache.page)
    check_fits(wanted.asked.sum(-1), cache)
    place = cache.slot_map.gather(2, wanted.page).masked_fill_(~wanted.asked, -1)
    hit, miss = place >= 0, wanted.asked & (place < 0)
    cache.steps.add_(1)
    b, g, i = hit.nonzero(as_tuple=True)
    cache.used[b, g, place[b, g, i].long()] = cache.steps[b, g]

    missing = miss.sum(-1)
    victims = (clock if cache.policy == "clock" else lru)(cache, missing[..., None])
    old = cache.pages.gather(2, victims)
    evicted = (old >= 0) & (torch.arange(cache.capacity, device=old.device) < missing[..., None])
    fetched = (wanted.vectors * miss).sum(-1) * cache.vector_bytes
    cache.counters.add_(torch.stack([hit.sum(-1), missing, evicted.sum(-1), fetched], -1))

    b, g, i = evicted.nonzero(as_tuple=True)
    cache.slot_map[b, g, old[b, g, i].long()] = -1
    b, g, i = miss.nonzero(as_tuple=True)
    at, page = victims[b, g, miss.cumsum(-1)[b, g, i] - 1], wanted.page[b, g, i]
    cache.pages[b, g, at], cache.used[b, g, at] = page.int(), cache.steps[b, g]
    cache.slot_map[b, g, page] = at.int()
    head = b * chosen.shape[1] + g
    fetch(store, cache, head, wanted.first[b, g, i], wanted.vectors[b, g, i], at)


def request(chosen: Tensor, store: Store, page: int) -> Request:
    cluster = chosen.long().clamp(min=0)
    begin = store.offsets.gather(2, cluster).long()
    size = (store.offsets.gather(2, cluster + 1) - begin).masked_fill_(chosen < 0, 0)
    pages = (size + page - 1) // page
    ends = pages.cumsum(-1)
    total = pages.sum(-1, keepdim=True)
    step = torch.arange(int(total.max()), device=ends.device).expand(*total.shape[:2], -1).contiguous()
    which = torch.searchsorted(ends, step, right=True).clamp_(max=max(ends.shape[-1] - 1, 0))
    cluster, begin, size, skipped = (x.gather(2, which) for x in (cluster, begin, size, ends - pages))
    asked = step < total
    i = torch.where(asked, step - skipped, 0)
    return Request(begin // page + cluster + i, begin + i * page, (size - i * page).clamp(max=page), asked)


def clock(cache: Cache, wanted: Tensor) -> Tensor:
    """Let the hands take `wanted [B, G, 1]` places: `[B, G, P]` places in the order they fall, those first."""
    ring = (cache.hand[..., None] + torch.arange(cache.capacity, device=wanted.device)) % cache.capacity
    used = cache.used.gather(2, ring)
    # What this step uses is passed by; the hand's second round takes what it found in use in the first.
    first, second = used == 0, (used != 0) & (used != cache.steps[..., None])
    found = first.sum(-1, keepdim=True)
    order = torch.where(first, first.cumsum(-1) - 1, found + second.cumsum(-1) - 1)
    order = order.masked_fill_(~(first | second), cache.capacity)
    last = (order == wanted - 1).int().argmax(-1, keepdim=True)
    place = torch.arange(cache.capacity, device=wanted.device)
    passed = second & ((wanted > found) | (place < last))
    cache.used.scatter_(2, ring, used.masked_fill(passed, 0))
    moved = ((ring.gather(2, last) + 1) % cache.capacity).int()
    cache.hand.copy_(torch.where(wanted > 0, moved, cache.hand[..., None])[..., 0])
    return by_rank(order, ring)


def lru(cache: Cache, wanted: Tensor) -> Tensor:
    """The `wanted [B, G, 1]` places used longest ago, the lowest among equals: as `clock`, but from the lowest up."""
    oldest = cache.used.sort(dim=-1, stable=True).indices  # what this step uses comes last
    place = torch.arange(cache.capacity, device=wanted.device).expand_as(oldest)
    taken = torch.zeros_like(oldest, dtype=torch.bool).scatter_(2, oldest, place < wanted)
    return by_rank((taken.cumsum(-1) - 1).masked_fill_(~taken, cache.capacity), place)


def by_rank(order: Tensor, place: Tensor) -> Tensor:
    """Places by their rank in `order`; those of rank P have none."""
    victims = torch.zeros(*order.shape[:2], order.shape[2] + 1, dtype=torch.long, device=order.device)
    return victims.scatter_(2, order, place.long())[..., :-1]


def fetch(store: Store, cache: Cache, head: Tensor, first: Tensor, vectors: Tensor, place: Tensor) -> None:
    """Copy `n` pages, each of `vectors` vectors of head `head` (row * G + KV head) from `first` on, to their places."""
    step = torch.arange(cache.page, device=head.device)
    live = step < vectors[:, None]
    source = ((head * store.k.shape[2] + first)[:, None] + step)[live].to(store.k.device)
    target = ((head * cache.capacity + place)[:, None] * cache.page + step)[live]
    for host, held in ((store.k, cache.k), (store.v, cache.v)):
        vector = host.flatten(0, 2).index_select(0, source).to(held.device)
        held.view(-1, held.shape[-1]).index_copy_(0, target, vector)


def cached(at: Tensor, cluster: Tensor, begin: Tensor, cache: Cache) -> Tensor:
    """Where members `at [B, G, n]` of `Store.k`, of clusters that start at `begin`, lie in `cache.k.flatten(2, 3)`.

    Any place at all for members that no cached page holds.
    """
    i = at - begin
    page = (begin.long() // cache.page + cluster + i // cache.page).clamp_(0, cache.slot_map.shape[2] - 1)
    return cache.slot_map.gather(2, page).long().clamp_(min=0) * cache.page + i % cache.page
