"""How the keys and values of attention are divided over shards: by KV head, by request, or by position."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import check_int

WAYS = ("head", "request", "sequence")
MOST_TURNS = 1 << 16  # of one round over the shards: a table of so many entries


class Shard(NamedTuple):
    """What one shard holds, as `split_decode` takes it."""

    k: Tensor  # [B, T, Hkv, D], or [pages, page_size, Hkv, D] behind a page table
    v: Tensor
    lengths: Tensor | None = None  # int32 [B]
    page_table: Tensor | None = None  # int32 [B, N]


@dataclass(frozen=True)
class SplitPlan:
    """Which shard holds what.

    Args:
        by: `"head"` (some KV heads of every request), `"request"` (whole requests) or `"sequence"` (some tokens of
            every request: states are merged).
        shards: how many.
        sizes: uneven shards, one int each, 0 allowed. head: KV heads. request, sequence: relative shares. None: as even
            as possible.
        block: sequence: tokens that a shard takes at a time. Position `p` belongs to the shard whose turn block
            `p // block` is; turns follow the shares and spread, so that a growing sequence stays balanced.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    by: str
    shards: int
    sizes: tuple[int, ...] | None = None
    block: int = 64

    def __post_init__(self) -> None:
        fn = "SplitPlan"
        if self.by not in WAYS:
            raise ValueError(f"{fn}: by must be one of {', '.join(map(repr, WAYS))}, got {self.by!r}")
        check_int(fn, "shards", self.shards, 1)
        check_int(fn, "block", self.block, 1)
        if self.sizes is None:
            return
        if not isinstance(self.sizes, Sequence):
            raise TypeError(f"{fn}: sizes must be a sequence of ints or None, got {self.sizes!r}")
        sizes = tuple(self.sizes)
        if len(sizes) != self.shards or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in sizes):
            raise ValueError(f"{fn}: sizes must be {self.shards} non-negative ints, one a shard, got {sizes}")
        if not any(sizes):
            raise ValueError(f"{fn}: sizes must not all be 0, got {sizes}")
        if self.by == "sequence" and sum(sizes) // math.gcd(*sizes) > MOST_TURNS:
            raise ValueError(f"{fn}: sizes must sum to at most {MOST_TURNS} over their common divisor, got {sizes}")
        object.__setattr__(self, "sizes", sizes)

    def head_bounds(self, kv_heads: int) -> list[tuple[int, int]]:
        """`[first, end)` of each shard's KV heads. ValueError where they do not fit the plan."""
        self._needs("head_bounds", "head")
        check_int("SplitPlan.head_bounds", "kv_heads", kv_heads, 1)
        if self.sizes is None and self.shards > kv_heads:
            raise ValueError(
                f"SplitPlan.head_bounds: shards must be at most the {kv_heads} KV heads, got {self.shards} "
                "(sizes may hold 0)"
            )
        if self.sizes is not None and sum(self.sizes) != kv_heads:
            raise ValueError(
                f"SplitPlan.head_bounds: sizes must sum to the {kv_heads} KV heads, got {self.sizes}, "
                f"which sum to {sum(self.sizes)}"
            )
        return _bounds(kv_heads, self._shares())

    def request_bounds(self, requests: int) -> list[tuple[int, int]]:
        """`[first, end)` of each shard's share of so many requests."""
        self._needs("request_bounds", "request")
        check_int("SplitPlan.request_bounds", "requests", requests, 0)
        return _bounds(requests, self._shares())

    def owner(self, positions: Tensor) -> Tensor:
        """int64 shard of each token position `>= 0`, in the shape of `positions` (of an integer dtype)."""
        self._needs("owner", "sequence")
        if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
            came = getattr(positions, "dtype", type(positions).__name__)
            raise TypeError(f"SplitPlan.owner: positions must be an int32 or int64 Tensor, got {came}")
        if positions.numel() and int(positions.min()) < 0:
            raise ValueError(f"SplitPlan.owner: positions must not be negative, got {int(positions.min())}")
        turns = torch.tensor(_turns(self._shares()), device=positions.device)
        return turns[positions // self.block % len(turns)]

    def count(self, length: int) -> list[int]:
        """Tokens of each shard in a sequence of `length`."""
        self._needs("count", "sequence")
        check_int("SplitPlan.count", "length", length, 0)
        turns = _turns(self._shares())
        blocks, rest = divmod(length, self.block)
        rounds, begun = divmod(blocks, len(turns))
        taken = [rounds * n for n in _reduced(self._shares())]
        for shard in turns[:begun]:
            taken[shard] += 1
        counts = [n * self.block for n in taken]
        counts[turns[begun]] += rest
        return counts

    def split(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> list[Shard]:
        """The shards of a cache: views of heads or of requests, copies of a sequence's tokens.

        Args:
            k, v: `[B, T, Hkv, D]`.
            lengths: int32 `[B]`: keys of each row; none past them is looked at.
        """
        _check_cache(k, v, lengths)
        if self.by == "head":
            return [Shard(k[:, :, a:b], v[:, :, a:b], lengths) for a, b in self.head_bounds(k.shape[2])]
        if self.by == "request":
            bounds = self.request_bounds(k.shape[0])
            return [Shard(k[a:b], v[a:b], None if lengths is None else lengths[a:b]) for a, b in bounds]
        owner, shards = self.owner(torch.arange(k.shape[1], device=k.device)), []
        for shard in range(self.shards):
            mine = owner == shard
            tokens = mine.nonzero().flatten()
            before = torch.nn.functional.pad(mine.cumsum(0), (1, 0))
            held = None if lengths is None else before[lengths.long()].int()
            shards.append(Shard(k.index_select(1, tokens), v.index_select(1, tokens), held))
        return shards

    def _shares(self) -> tuple[int, ...]:
        return (1,) * self.shards if self.sizes is None else self.sizes

    def _needs(self, method: str, by: str) -> None:
        if self.by != by:
            raise ValueError(f"SplitPlan.{method}: needs a plan by {by!r}, this one is by {self.by!r}")


def _bounds(total: int, shares: tuple[int, ...]) -> list[tuple[int, int]]:
    edges = [0, *(total * upto // sum(shares) for upto in itertools.accumulate(shares))]
    return list(itertools.pairwise(edges))


def _reduced(shares: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n // math.gcd(*shares) for n in shares)


@functools.lru_cache(maxsize=64)
def _turns(shares: tuple[int, ...]) -> tuple[int, ...]:
    """The shard of each block of one round: a shard with `n` turns is due in the middle of every `n`-th of it."""
    reduced = _reduced(shares)
    due = [((2 * turn + 1) / n, shard) for shard, n in enumerate(reduced) for turn in range(n)]
    return tuple(shard for _, shard in sorted(due))


def _check_cache(k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    fn = "SplitPlan.split"
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{fn}: {name} must be a Tensor, got {type(x).__name__}")
    if k.ndim != 4 or v.shape != k.shape:
        raise ValueError(f"{fn}: k and v must have one shape [B, T, Hkv, D], got {list(k.shape)} and {list(v.shape)}")
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int32:
        raise TypeError(
            f"{fn}: lengths must be an int32 Tensor, got {getattr(lengths, 'dtype', type(lengths).__name__)}"
        )
    if lengths.shape != k.shape[:1] or lengths.device != k.device:
        raise ValueError(
            f"{fn}: lengths must have shape {[k.shape[0]]} on {k.device}, got {list(lengths.shape)} on {lengths.device}"
        )
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= k.shape[1]:
        raise ValueError(f"{fn}: lengths must be in 0..{k.shape[1]}, got {lengths.tolist()}")
