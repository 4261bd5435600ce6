"""RetroInfer's wave buffer: the clusters' keys and values in host memory, and the pages read of late on the device."""

from dataclasses import dataclass
from typing import Any

import torch

from .dispatch import check_int
from .kernels.retroinfer.buffer import POLICIES, Cache, allocate, clear, over, page_ids
from .wave_config import check_share
from .wave_index import WaveIndex


@dataclass(frozen=True)
class WaveStats:
    """What a `WaveBuffer` did since it was made or reset, all rows and KV heads together.

    Attributes:
        hits, misses, evictions: in pages.
        bytes: of keys and values that misses brought over the bus.
        steps: calls served.
        capacity_pages: places of one row and KV head.
        page: vectors of a page, at most.
        cache_bytes: of all places.
    """

    hits: int
    misses: int
    evictions: int
    bytes: int
    steps: int
    capacity_pages: int
    page: int
    cache_bytes: int

    @property
    def hit_ratio(self) -> float:
        """Share of the pages asked for that were cached; 0 before any was."""
        return self.hits / max(1, self.hits + self.misses)


class WaveBuffer:
    """A block cache for each row and KV head of a `WaveIndex`, for `wave_attention(q, index, buffer=buffer)`.

    The paper's wave buffer (arXiv 2505.02922), with its bookkeeping on the device.

    The retrieval zone reads its vectors from the cache, in pages of up to `page` vectors of one cluster; what it lacks
    is copied in first. Outputs are what they are without a buffer. An index on a CUDA device gives up its keys and
    values in clusters to pinned host memory, for good: it is then read through buffers only. On a CPU the two tiers are
    two tensors.

    A step whose pages do not all fit is an error with the sizes, and changes nothing. The portable and the reference
    backend raise it at once. GPU kernels never wait for the host: they read that head's missing pages from host memory,
    leave its cache as it is, and `stats` and `check` raise.

    An index that takes further tokens keeps its cached pages; its `reset` resets its buffers. All tensors of the cache
    keep their addresses.

    Args:
        index: may have several buffers.
        device_budget: share of a row's reserved tokens that a cache has places for, in `(0, 1]`, in whole pages, at
            least one. Clusters seldom fill their last page; 1 is a place for every page.
        policy: which pages make room, `"clock"` or `"lru"`.
        page: vectors.

    Attributes:
        index, policy, page: as given.
        capacity: places, in pages, of each row and KV head.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(self, index: WaveIndex, device_budget: float = 0.05, policy: str = "clock", *, page: int = 8) -> None:
        fn = "WaveBuffer"
        if not isinstance(index, WaveIndex):
            raise TypeError(f"{fn}: index must be a WaveIndex, got {type(index).__name__}")
        check_caching(fn, device_budget, policy)
        check_int(fn, "page", page, 1)
        reserved, every = index.store.k.shape[2], page_ids(index.store, page)
        self.capacity = every if device_budget == 1 else max(1, int(device_budget * reserved) // page)
        self.index, self.policy, self.page = index, policy, page
        _offload(index)
        self._cache: Cache | None = allocate(index.store, self.capacity, page, policy)
        index._buffers.add(self)

    @property
    def cache(self) -> Cache:
        """The tensors, see `kernels/retroinfer/buffer.py`."""
        return self._open("WaveBuffer.cache")

    @property
    def closed(self) -> bool:
        return self._cache is None

    def stats(self) -> WaveStats:
        """The counters, read from the device.

        Raises:
            ValueError: as `check`.
        """
        cache = self._check("WaveBuffer.stats")
        hits, misses, evictions, copied = cache.counters.sum((0, 1)).tolist()
        held = cache.k.nbytes + cache.v.nbytes
        return WaveStats(
            hits, misses, evictions, copied, int(cache.steps.max()), self.capacity, self.page, cache_bytes=held
        )

    def check(self) -> None:
        """Wait for the device and raise if a step asked for more pages than a cache holds.

        Raises:
            ValueError: with the sizes, from then on until `reset`; or the buffer is closed.
        """
        self._check("WaveBuffer.check")

    def _open(self, fn: str) -> Cache:
        if self._cache is None:
            raise ValueError(f"{fn}: the buffer is closed")
        return self._cache

    def _check(self, fn: str) -> Cache:
        cache = self._open(fn)
        most, at = cache.overflow.flatten().max(0)
        if int(most):
            row, head = divmod(int(at), cache.overflow.shape[1])
            raise ValueError(f"{fn}: row {row}, KV head {head} {over(int(most), cache)}")
        return cache

    def reset(self) -> None:
        """Empty the caches and count anew.

        Raises:
            ValueError: the buffer is closed.
        """
        clear(self._open("WaveBuffer.reset"))

    def close(self) -> None:
        """Free the caches; the index and its other buffers live on. Closing twice is fine."""
        self._cache = None
        self.index._buffers.discard(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.closed:
            self.index._buffers.add(self)

    def __enter__(self) -> "WaveBuffer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.capacity} pages of {self.page} vectors for each row and KV head"
        return f"WaveBuffer({state}, policy={self.policy!r})"


def check_caching(fn: str, device_budget: float, policy: str) -> None:
    check_share(fn, "device_budget", device_budget)
    if policy not in POLICIES:
        raise ValueError(f"{fn}: policy must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}")


def _offload(index: WaveIndex) -> None:
    """Move an index's keys and values in clusters from a CUDA device to host memory that its kernels can read."""
    if index.store.k.is_cuda:
        shape, dtype = index.store.k.shape, index.store.k.dtype
        k, v = (
            torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True).copy_(x)
            for x in (index.store.k, index.store.v)
        )
        index.store = index.store._replace(k=k, v=v)
