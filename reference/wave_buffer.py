"""The wave buffer's cache policy (arXiv 2505.02922): which pages of clusters stay on the device, in plain Python.

A cache belongs to one batch row and KV head. Its unit is a page: up to `page` vectors (key and value) of one cluster.
"""

from collections.abc import Mapping


def cluster_pages(cluster: int, offset: int, size: int, page: int = 8) -> dict[int, int]:
    """Ids of a cluster's pages and how many vectors each holds; `offset`: vectors of the clusters before it.

    Ids of different clusters never meet, rise with the cluster, and stay what they are when clusters are appended.
    """
    return {offset // page + cluster + i: min(page, size - i * page) for i in range(-(-size // page))}


class PolicyModel:
    """A cache of `capacity` pages under `policy` "clock" or "lru", with counters.

    Attributes:
        pages: `[capacity]`, the page in each place, None while empty.
        used: `[capacity]`: CLOCK's reference bit; LRU's step of the last use, counted from 1 (0: never).
        hand: the place CLOCK looks at next.
        hits, misses, evictions: in pages. bytes: what misses brought over the bus.
    """

    def __init__(self, capacity: int, policy: str = "clock", vector_bytes: int = 1) -> None:
        self.capacity, self.policy, self.vector_bytes = capacity, policy, vector_bytes
        self.pages: list[int | None] = [None] * capacity
        self.used = [0] * capacity
        self.hand = self.steps = self.hits = self.misses = self.evictions = self.bytes = 0

    def step(self, request: Mapping[int, int]) -> dict[int, int]:
        """Serve the pages of one decode step, `{id: vectors}`, and return the place of each.

        Pages of the step, those it admits included, are never its victims. Missing ones come in by rising id.

        Raises:
            ValueError: more pages than places; nothing has changed then.
        """
        if len(request) > self.capacity:
            raise ValueError(f"PolicyModel: one step asks for {len(request)} pages, the cache holds {self.capacity}")
        self.steps += 1
        found = {page: place for place, page in enumerate(self.pages) if page is not None and page in request}
        missing = sorted(request.keys() - found.keys())
        mark = 1 if self.policy == "clock" else self.steps
        for place in found.values():
            self.used[place] = mark
        victims = (self._clock if self.policy == "clock" else self._lru)(len(missing), set(found.values()))
        for page, place in zip(missing, victims, strict=True):
            self.evictions += self.pages[place] is not None
            self.bytes += request[page] * self.vector_bytes
            self.pages[place], self.used[place], found[page] = page, mark, place
        self.hits += len(request) - len(missing)
        self.misses += len(missing)
        return found

    def _clock(self, count: int, pinned: set[int]) -> list[int]:
        """The hand passes pinned places, clears the bits it meets and takes places whose bit is clear."""
        victims: list[int] = []
        while len(victims) < count:
            place = self.hand
            self.hand = (place + 1) % self.capacity
            if place in pinned:
                continue
            if self.used[place]:
                self.used[place] = 0
            else:
                victims.append(place)
                pinned.add(place)
        return victims

    def _lru(self, count: int, pinned: set[int]) -> list[int]:
        """The least recently used places, the lowest among equals; filled from the lowest up."""
        free = [place for place in range(self.capacity) if place not in pinned]
        return sorted(sorted(free, key=lambda place: (self.used[place], place))[:count])
