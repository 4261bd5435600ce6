"""A tier of host memory for stored chunks: a byte budget, the longest unused chunk goes first."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from .store_key import ChunkKV


@dataclass
class Tally:
    """What `TierStats` counts."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class Memory:
    """Not safe for threads: the store's lock holds around every call."""

    def __init__(self, budget: int, pinned: bool) -> None:
        self.budget, self.pinned, self.nbytes = budget, pinned, 0
        self.tally = Tally()
        self.chunks: OrderedDict[str, ChunkKV] = OrderedDict()  # the longest unused first

    def fits(self, nbytes: int) -> bool:
        return nbytes <= self.budget

    def get(self, digest: str) -> ChunkKV | None:
        found = self.chunks.get(digest)
        self.tally.hits += found is not None
        self.tally.misses += found is None
        return found

    def put(self, kv: ChunkKV) -> list[ChunkKV]:
        """Take a chunk that is not here; what has no place after it: others, or itself when it is over the budget."""
        if not self.fits(kv.nbytes):
            return [kv]
        out = []
        while self.nbytes + kv.nbytes > self.budget:
            _, old = self.chunks.popitem(last=False)
            self.nbytes -= old.nbytes
            out.append(old)
        self.tally.evictions += len(out)
        self.chunks[kv.key.digest] = kv if kv.k.is_pinned() == self.pinned else copied(kv, self.pinned)
        self.nbytes += kv.nbytes
        return out

    def discard(self, digest: str) -> bool:
        found = self.chunks.pop(digest, None)
        if found is None:
            return False
        self.nbytes -= found.nbytes
        return True

    def clear(self) -> None:
        self.chunks.clear()
        self.nbytes = 0


def place(x: Tensor, pinned: bool) -> Tensor:
    """A copy of `x` in host memory of its own, contiguous."""
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pinned).copy_(x.detach())


def copied(kv: ChunkKV, pinned: bool) -> ChunkKV:
    return ChunkKV(kv.key, place(kv.k, pinned), place(kv.v, pinned), kv.neighbours)
