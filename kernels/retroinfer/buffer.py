"""What the wave buffer's backends agree on: how its cache lies in memory, and which pages a step asks for.

The vectors of clusters lie in host memory in cluster order (`Store.k, v`), those read of late in a cache on the device,
one per row and KV head. Both move in pages: up to `page` vectors of one cluster. Page `i` of cluster `c` has the id
`offsets[c] // page + c + i`: ids of clusters never meet and rise with them, and appended clusters get fresh ones.
Legend beyond `spec.py`: `P` places of a cache, `M` page ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Store

POLICIES = ("clock", "lru")
COUNTERS = ("hits", "misses", "evictions", "bytes")


class Cache(NamedTuple):
    """The caches of a batch and their policy's state. A page has the same place in `k` and `v`."""

    k: Tensor  # [B, G, P, page, D]
    v: Tensor  # [B, G, P, page, D]
    slot_map: Tensor  # [B, G, M] int32 place of each page, -1: not cached
    pages: Tensor  # [B, G, P] int32 page in each place, -1: empty
    used: Tensor  # [B, G, P] int32 step of the last use; CLOCK clears it to 0 instead of its reference bit
    hand: Tensor  # [B, G] int32 place CLOCK looks at next
    steps: Tensor  # [B, G] int32 steps served
    counters: Tensor  # [B, G, 4] int64, see COUNTERS: pages, pages, pages, bytes of keys and values fetched
    overflow: Tensor  # [B, G] int32 most pages that a step refused for their number has asked for
    policy: str  # "clock" or "lru"

    @property
    def page(self) -> int:
        return self.k.shape[3]

    @property
    def capacity(self) -> int:
        return self.pages.shape[2]

    @property
    def vector_bytes(self) -> int:
        """Bytes of a key and its value."""
        return 2 * self.k.shape[4] * self.k.itemsize


def page_ids(store: Store, page: int) -> int:
    """Every id is below."""
    return store.k.shape[2] // page + store.offsets.shape[2] - 1


def allocate(store: Store, capacity: int, page: int, policy: str) -> Cache:
    """Empty caches of `capacity` pages on the index's device."""
    lead, device = store.offsets.shape[:2], store.offsets.device

    def state(*shape: int, value: int = 0) -> Tensor:
        return torch.full((*lead, *shape), value, dtype=torch.int32, device=device)

    shape = (*lead, capacity, page, store.k.shape[3])
    k, v = (torch.empty(shape, dtype=store.k.dtype, device=device) for _ in range(2))
    pages = state(capacity, value=-1)
    slot_map = state(page_ids(store, page), value=-1)
    return Cache(k, v, slot_map, pages, state(capacity), state(), state(), state(4).long(), state(), policy)


def clear(cache: Cache) -> None:
    """Forget all pages, steps and counters, in place."""
    cache.slot_map.fill_(-1)
    cache.pages.fill_(-1)
    for x in (cache.used, cache.hand, cache.steps, cache.counters, cache.overflow):
        x.zero_()


def check_fits(asked: Tensor, cache: Cache) -> None:
    """Raise where a head asks for more pages, `asked [B, G]`, than its cache has places. Reads them on the host."""
    most, at = asked.flatten().max(0)
    if int(most) > cache.capacity:
        row, head = divmod(int(at), asked.shape[1])
        raise ValueError(f"wave_attention: row {row}, KV head {head} {over(int(most), cache)}")


def over(asked: int, cache: Cache) -> str:
    return (
        f"asks for {asked} pages of {cache.page} vectors in one step, its cache holds {cache.capacity}: it takes a "
        f"larger device_budget of the WaveBuffer, or a smaller retrieval_ratio"
    )
