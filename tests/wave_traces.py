"""Wave buffers beside the plain model of their policy: clusters of any sizes, and what a step must leave behind."""

from collections.abc import Callable

import pytest
import torch

from attnlab.kernels.retroinfer.buffer import Cache, allocate
from attnlab.kernels.retroinfer.spec import Spec, Store
from attnlab.kernels.retroinfer.spec import allocate as allocate_store
from attnlab.reference.wave_buffer import PolicyModel, cluster_pages

BATCH, HEADS = 2, 2
EVERY = [(b, g) for b in range(BATCH) for g in range(HEADS)]
Choice = dict[tuple[int, int], list[int]]


class Trace:
    """Caches of `capacity` pages over a store of up to `tokens` vectors a head, and a model for each.

    `refuses`: whether `serve(chosen, store, cache)` raises for too many pages, or notes them on the device.
    """

    def __init__(
        self, serve: Callable[..., None], policy: str, capacity: int, page: int = 3, *, tokens: int = 80,
        dim: int = 2, dtype: torch.dtype = torch.float32, refuses: bool = True, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.serve, self.page, self.refuses = serve, page, refuses
        store = allocate_store(BATCH, HEADS, dim, tokens, Spec(0, 0, 2, 2, 1, False, 0, 2), dtype, device)
        rng = torch.Generator().manual_seed(0)
        k, v = (torch.randn(store.k.shape, generator=rng).to(dtype) for _ in "kv")
        if device == "cuda":
            k, v = k.pin_memory(), v.pin_memory()
        self.store: Store = store._replace(k=k, v=v)
        self.cache: Cache = allocate(self.store, capacity, page, policy)
        self.vector_bytes = 2 * dim * dtype.itemsize
        self.sizes: dict[tuple[int, int], list[int]] = {at: [] for at in EVERY}
        self.reset_models()

    def reset_models(self) -> None:
        capacity, policy = self.cache.capacity, self.cache.policy
        self.models = {at: PolicyModel(capacity, policy, self.vector_bytes) for at in EVERY}
        self.refused = dict.fromkeys(EVERY, 0)

    def grow(self, at: tuple[int, int], sizes: list[int]) -> None:
        """Append clusters, as many as there is room for."""
        for size in sizes:
            held = self.sizes[at]
            if len(held) + 1 < self.store.offsets.shape[2] and sum(held) + size <= self.store.k.shape[2]:
                held.append(size)
        ends = torch.tensor(self.sizes[at], dtype=torch.int32).cumsum(0)
        self.store.offsets[at] = sum(self.sizes[at])
        self.store.offsets[at][0] = 0
        self.store.offsets[at][1 : 1 + len(ends)] = ends

    def pages(self, at: tuple[int, int], clusters: list[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Vectors of each page of some clusters, and the first of them."""
        vectors, first = {}, {}
        for c in clusters:
            begin = sum(self.sizes[at][:c])
            found = cluster_pages(c, begin, self.sizes[at][c], self.page)
            vectors |= found
            first |= {x: begin + i * self.page for i, x in enumerate(found)}
        return vectors, first

    def asked(self, choice: Choice) -> dict[tuple[int, int], int]:
        return {at: len(self.pages(at, choice[at])[0]) for at in EVERY}

    def step(self, choice: Choice, width: int = 1) -> None:
        """Serve some clusters of each head, and hold everything against the models."""
        width = max([width, *map(len, choice.values())])
        chosen = torch.full((BATCH, HEADS, width), -1, dtype=torch.int32)
        for at, clusters in choice.items():
            chosen[at][: len(clusters)] = torch.tensor(sorted(clusters), dtype=torch.int32)
        chosen = chosen.to(self.store.offsets.device)
        asked, capacity = self.asked(choice), self.cache.capacity
        over = [at for at in EVERY if asked[at] > capacity]
        if over and self.refuses:
            before = [x.nan_to_num() for x in self.cache[:-1]]
            with pytest.raises(
                ValueError, match=rf"asks for {max(asked.values())} pages .* its cache holds {capacity}:"
            ):
                self.serve(chosen, self.store, self.cache)
            assert all(torch.equal(x.nan_to_num(), y) for x, y in zip(self.cache[:-1], before, strict=True))
            return
        self.serve(chosen, self.store, self.cache)
        for at in EVERY:
            if at in over:
                self.refused[at] = max(self.refused[at], asked[at])
            else:
                self.models[at].step(self.pages(at, choice[at])[0])
        self.check()

    def check(self) -> None:
        cache = self.cache
        for at, model in self.models.items():
            pages = cache.pages[at].tolist()
            assert pages == [-1 if x is None else x for x in model.pages]
            used = cache.used[at].tolist()
            assert ([int(x > 0) for x in used] if cache.policy == "clock" else used) == model.used
            assert (int(cache.hand[at]), int(cache.steps[at])) == (model.hand, model.steps)
            assert cache.counters[at].tolist() == [model.hits, model.misses, model.evictions, model.bytes]
            assert int(cache.overflow[at]) == self.refused[at]
            where = {x: place for place, x in enumerate(pages) if x >= 0}
            assert {x: p for x, p in enumerate(cache.slot_map[at].tolist()) if p >= 0} == where
            vectors, first = self.pages(at, list(range(len(self.sizes[at]))))
            for x, place in where.items():
                source = slice(first[x], first[x] + vectors[x])
                for host, copy in ((self.store.k, cache.k), (self.store.v, cache.v)):
                    assert torch.equal(copy[at][place, : vectors[x]].cpu(), host[at][source])


def random_choice(trace: Trace, rng: torch.Generator, most: int) -> Choice:
    """Up to `most` clusters of each head."""

    def some(count: int) -> list[int]:
        wanted = int(torch.randint(most + 1, (), generator=rng))
        return torch.randperm(count, generator=rng)[:wanted].tolist()

    return {at: some(len(sizes)) for at, sizes in trace.sizes.items()}


def run(trace: Trace, turns: int, most: int, sizes: int = 9, clusters: int = 24, seed: int = 0) -> list[int]:
    """Some turns, with more clusters of each head at every tenth: hits, misses and evictions."""
    rng = torch.Generator().manual_seed(seed)
    for turn in range(turns):
        if turn % 10 == 0:
            for at in EVERY:
                trace.grow(at, torch.randint(0, sizes, (clusters,), generator=rng).tolist())
        trace.step(random_choice(trace, rng, most), most)
    return [sum(getattr(m, name) for m in trace.models.values()) for name in ("hits", "misses", "evictions")]
