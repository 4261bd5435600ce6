"""Which shard has which heads, requests and tokens: what both sides of the protocol derive from the same commands."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import SplitPlan


class Part(NamedTuple):
    """What one shard has of one step of a batch."""

    shard: int
    rank: int
    rows: slice | Tensor  # of the batch: which queries it answers
    size: int  # how many
    heads: slice  # query heads
    kv_heads: slice
    new: slice | Tensor  # of the batch: whose new token it keeps. A subset of rows, in their order
    new_size: int


class PromptPart(NamedTuple):
    """What one shard keeps of a prompt."""

    shard: int
    rank: int
    tokens: slice | Tensor
    size: int
    kv_heads: slice


class Placement:
    """The requests' lengths (tokens with keys) and where they are.

    Args:
        plan: how attention is divided.
        replicas: model workers; shard `s` is rank `replicas + s`.
        heads, kv_heads: of the model.

    Raises ValueError where the plan does not fit the KV heads, and KeyError on ids that are not there.
    """

    def __init__(self, plan: SplitPlan, replicas: int, heads: int, kv_heads: int) -> None:
        self.plan, self.replicas = plan, replicas
        self.lengths: dict[int, int] = {}
        self.shards: dict[int, int | None] = {}  # by request only
        self._group = heads // kv_heads
        bounds = plan.head_bounds(kv_heads) if plan.by == "head" else [(0, kv_heads)] * plan.shards
        self._kv_heads = [slice(a, b) for a, b in bounds]

    def admit(self, id: int, length: int, shard: int | None = None) -> None:
        """A new request, whose prompt is about to be run. `shard`: where it goes, by request."""
        if id in self.lengths:
            raise ValueError(f"Placement.admit: id must be a new one, got {id}")
        if (shard is None) == (self.plan.by == "request"):
            raise ValueError(f"Placement.admit: shard must be given by request only, got {shard} by {self.plan.by!r}")
        self.lengths[id], self.shards[id] = length, shard

    def advance(self, ids: Sequence[int]) -> None:
        """Each got a token more."""
        for id in ids:
            self.lengths[id] += 1

    def drop(self, ids: Sequence[int]) -> None:
        for id in ids:
            del self.lengths[id], self.shards[id]

    def kv_heads(self, shard: int) -> int:
        """How many a shard has."""
        return self._kv_heads[shard].stop - self._kv_heads[shard].start

    def parts(self, ids: Sequence[int]) -> list[Part]:
        """The shards that take part in a batch's step, in order of rank."""
        found = (self.part(shard, ids) for shard in range(self.plan.shards))
        return [part for part in found if part is not None]

    def part(self, shard: int, ids: Sequence[int]) -> Part | None:
        """What a shard has of a batch's step, if anything."""
        rows, new = self._rows(shard, ids)
        size = _size(rows, len(ids))
        if not size:
            return None
        kv = self._kv_heads[shard]
        heads = slice(kv.start * self._group, kv.stop * self._group)
        return Part(shard, self.replicas + shard, rows, size, heads, kv, new, _size(new, len(ids)))

    def prompt(self, id: int) -> list[PromptPart]:
        """The shards that keep some of a request's prompt, in order of rank."""
        found = (self.prompt_part(shard, id) for shard in range(self.plan.shards))
        return [part for part in found if part is not None]

    def prompt_part(self, shard: int, id: int) -> PromptPart | None:
        """What a shard keeps of a request's prompt, if anything."""
        length = self.lengths[id]
        tokens: slice | Tensor = slice(None)
        if self.plan.by == "sequence":
            tokens = (self.plan.owner(torch.arange(length)) == shard).nonzero().flatten()
        elif not self._has(shard, id):
            tokens = slice(0)
        size = _size(tokens, length)
        return PromptPart(shard, self.replicas + shard, tokens, size, self._kv_heads[shard]) if size else None

    def _has(self, shard: int, id: int) -> bool:
        return self.shards[id] == shard if self.plan.by == "request" else self.kv_heads(shard) > 0

    def _rows(self, shard: int, ids: Sequence[int]) -> tuple[slice | Tensor, slice | Tensor]:
        """The rows whose queries a shard answers, and those whose new token it keeps."""
        if self.plan.by == "head":
            every = slice(None) if self.kv_heads(shard) else slice(0)
            return every, every
        if self.plan.by == "request":
            mine = torch.tensor([row for row, id in enumerate(ids) if self.shards[id] == shard], dtype=torch.int64)
            return mine, mine
        lengths = torch.tensor([self.lengths[id] for id in ids], dtype=torch.int64)
        new = self.plan.owner(lengths) == shard
        old = torch.tensor([self.plan.count(length)[shard] > 0 for length in lengths.tolist()], dtype=torch.bool)
        return (old | new).nonzero().flatten(), new.nonzero().flatten()


def _size(rows: slice | Tensor, total: int) -> int:
    return len(range(*rows.indices(total))) if isinstance(rows, slice) else len(rows)
