"""A paged pool of keys and values: requests of any length share one memory, and one table serves all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import check_int


class KVPool:
    """`k[layer], v[layer] [pages, page_size, Hkv, D]`, and which pages hold which request.

    Args:
        page_size: tokens a page.
        capacity: tokens in all, in whole pages, all allocated at once. None: the pool doubles when it is full.

    Attributes:
        k, v: one tensor for each layer; others after the pool grew.
        pages: how many there are; free: how many of them hold nothing.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        page_size: int = 64,
        capacity: int | None = None,
    ) -> None:
        check_int("KVPool", "page_size", page_size, 1)
        if capacity is not None:
            check_int("KVPool", "capacity", capacity, 1)
            if capacity < page_size:
                raise ValueError(f"KVPool: capacity must be at least a page of {page_size} tokens, got {capacity}")
        self.page_size, self.fixed = page_size, capacity is not None
        self.pages = 1 if capacity is None else capacity // page_size
        shape = (self.pages, page_size, kv_heads, head_dim)
        self.k, self.v = ([torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in "kv")
        self._device = device
        self._free = list(reversed(range(self.pages)))
        self._held: dict[int, list[int]] = {}
        self._tokens: dict[int, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def __contains__(self, id: int) -> bool:
        return id in self._held

    def tokens(self, id: int) -> int:
        """How many a request has; 0 for one that is not here."""
        return self._tokens.get(id, 0)

    def extend(self, id: int, tokens: int) -> list[int]:
        """Make room for more tokens of a request. Returns where each goes: `page * page_size + offset`.

        MemoryError when a pool of a fixed capacity is full; nothing is taken then.
        """
        before, pages = self.tokens(id), self._held.get(id, [])
        after = before + tokens
        missing = -(-after // self.page_size) - len(pages)
        if missing > len(self._free):
            self._grow(id, missing)
        pages = pages + [self._free.pop() for _ in range(missing)]
        self._held[id], self._tokens[id] = pages, after
        return [pages[at // self.page_size] * self.page_size + at % self.page_size for at in range(before, after)]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put `k, v [n, Hkv, D]` of a layer where `extend` said (int64 `[n]`)."""
        for pool, x in ((self.k[layer], k), (self.v[layer], v)):
            pool.flatten(0, 1).index_copy_(0, slots, x)

    def table(self, ids: Sequence[int]) -> Tensor:
        """int32 `[len(ids), N]`, N >= 1: the pages of each request; 0 behind its last."""
        rows = [self._held.get(id, []) for id in ids]
        wide = max([1, *map(len, rows)])
        flat = [row + [0] * (wide - len(row)) for row in rows]
        return torch.tensor(flat, dtype=torch.int32, device=self._device).view(len(rows), wide)

    def drop(self, id: int) -> None:
        """Give a request's pages back."""
        self._free += reversed(self._held.pop(id))
        del self._tokens[id]

    def _grow(self, id: int, missing: int) -> None:
        if self.fixed:
            raise MemoryError(
                f"KVPool: request {id} needs {missing} more pages of {self.page_size} tokens, "
                f"{len(self._free)} of {self.pages} are free"
            )
        pages = self.pages
        while pages - self.pages + len(self._free) < missing:
            pages *= 2
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                tensors[layer] = new = torch.empty((pages, *old.shape[1:]), dtype=old.dtype, device=old.device)
                new[: self.pages] = old
        self._free = list(reversed(range(self.pages, pages))) + self._free
        self.pages = pages
