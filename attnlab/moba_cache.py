"""A key-value cache that keeps the sum of each block's keys, so that a MoBA decode step reads little else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import check_int, check_ints
from .kernels.moba.spec import cdiv

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MoBACache:
    """Keys, values and the sum of each block's keys, for a batch of rows of their own lengths.

    The capacity is fixed: a token over it is a `ValueError` that leaves the cache as it was. Contiguous storage gives
    each row `capacity` slots; paged storage shares one pool, and a row takes pages as it grows.

    Args:
        batch: rows.
        capacity: tokens a row can hold (with `starts`, its padding included).
        kv_heads, head_dim: of the keys and values.
        block_size: MoBA's, fixed with the cache because the sums are per block.
        dtype: float16, bfloat16, float32 or float64 (reference and portable backends). Sums are float32 (float64).
        device: the default device if None.
        page_size: tokens per page, any positive int (multiples of `block_size` read fastest); None: contiguous.
        pages: pages in the pool; by default what all rows need when full.
        starts: left padding of each row, contiguous storage only. All rows then take the same tokens at once, as a
            padded batch does, and row `b` skips its first `starts[b]`; its blocks begin at its first real token.

    Attributes:
        k_pages, v_pages: `[pages, page_size, kv_heads, head_dim]`; contiguous: `[batch, capacity, kv_heads, head_dim]`.
        table: `[batch, pages per row]` int32, the pages of a row in order.
        sums: `[batch, ceil(capacity / block_size), kv_heads, head_dim]`.
        device_lengths: `[batch]` int32, what kernels read; `lengths` is its mirror on the host.

    CUDA graphs: all of these keep their addresses. Capture `cache.write(k, v)` and a one-token `moba_decode`, which
    read nothing back; before each replay call `cache.claim()`, which does the host's share (room, pages, lengths).
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        page_size: int | None = None,
        pages: int | None = None,
        starts: Sequence[int] | Tensor | None = None,
    ) -> None:
        sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, value in (sizes | {"block_size": block_size}).items():
            check_int("MoBACache", name, value, 1)
        if dtype not in _DTYPES:
            raise TypeError(f"MoBACache: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        self.batch, self.capacity, self.block_size, self.page_size = batch, capacity, block_size, page_size
        self._starts = self._check_starts(starts)
        if page_size is None:
            if pages is not None:
                raise ValueError(f"MoBACache: pages needs page_size, got pages={pages}")
            pool, page, per_row = batch, capacity, 1
        else:
            check_int("MoBACache", "page_size", page_size, 1)
            page, per_row = page_size, cdiv(capacity, page_size)
            pool = batch * per_row if pages is None else pages
            check_int("MoBACache", "pages", pool, 1)
        if device is None:
            device = torch.get_default_device()
        self.k_pages = torch.zeros(pool, page, kv_heads, head_dim, dtype=dtype, device=device)
        self.v_pages = torch.zeros_like(self.k_pages)
        self.table = torch.zeros(batch, per_row, dtype=torch.int32, device=device)
        if page_size is None:
            self.table[:, 0] = torch.arange(batch)
        sums_dtype = torch.promote_types(dtype, torch.float32)
        blocks = cdiv(capacity, block_size)
        self.sums = torch.zeros(batch, blocks, kv_heads, head_dim, dtype=sums_dtype, device=device)
        self.device_lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.starts = None if starts is None else torch.tensor(self._starts, dtype=torch.int32, device=device)
        self._rows = torch.arange(batch, device=device)
        self._lengths, self._cursor = [0] * batch, 0
        self._free = list(range(pool))[::-1]
        self._owned: list[list[int]] = [[] for _ in range(batch)]

    def _check_starts(self, starts: Sequence[int] | Tensor | None) -> list[int]:
        if starts is None:
            return [0] * self.batch
        if self.page_size is not None:
            raise ValueError(f"MoBACache: starts needs contiguous storage, got page_size={self.page_size}")
        values = check_ints("MoBACache", "starts", starts)
        if len(values) != self.batch or not all(0 <= s <= self.capacity for s in values):
            raise ValueError(f"MoBACache: starts must be {self.batch} ints in 0..{self.capacity}, got {values}")
        return values

    def __repr__(self) -> str:
        _, page, heads, dim = self.k_pages.shape
        paged = f"{len(self._free)} of {len(self.k_pages)} pages of {page} free"
        return (
            f"MoBACache({self.batch} rows of {self.capacity}, {heads} heads of {dim}, block_size={self.block_size}, "
            f"{self.k_pages.dtype}, {self.k_pages.device}, {paged if self.page_size else 'contiguous'}, "
            f"lengths={self._lengths})"
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each row holds."""
        return tuple(self._lengths)

    @property
    def free_pages(self) -> int:
        """Pages no row holds (0 for contiguous storage)."""
        return 0 if self.page_size is None else len(self._free)

    def append(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Store `k, v [batch, T, kv_heads, head_dim]`; row `b` takes its first `lengths[b]` tokens (all by default).

        Raises:
            ValueError, TypeError: wrong shapes or dtype, or no room; the cache is then unchanged.
        """
        self._check_new(k, v)
        old, tokens = self._lengths, k.shape[1]
        counts = token_counts("MoBACache.append", "lengths", lengths, self.batch, tokens)
        if lengths is not None and self.starts is not None:
            raise ValueError("MoBACache.append: lengths needs a cache without starts")
        skips = [0] * self.batch
        if self.starts is not None:
            skips = [min(max(start - self._cursor, 0), tokens) for start in self._starts]
            counts = [tokens - skip for skip in skips]
        self._claim(counts, tokens)
        if tokens == 1 and counts == [1] * self.batch:
            self.write(k, v)
            return
        k, v = k.detach(), v.detach()
        # Rows that held as much and take as much have the same padding too.
        alike = self.page_size is None and len(set(zip(old, counts, strict=True))) == 1
        for rows in [slice(0, self.batch)] if alike else [slice(b, b + 1) for b in range(self.batch)]:
            b = rows.start
            part = slice(skips[b], skips[b] + counts[b])
            if counts[b]:
                self._store(rows, old[b], k[rows, part], v[rows, part])
        self.device_lengths += torch.tensor(counts, dtype=torch.int32).to(self.device_lengths.device)

    def claim(self, tokens: int = 1) -> None:
        """The host's share of appending `tokens` to every row: checks room, takes pages, counts. See `write`."""
        check_int("MoBACache.claim", "tokens", tokens, 1)
        if self.starts is not None and self._cursor < max(self._starts):
            raise ValueError(f"MoBACache.claim: append the padded prompt of {max(self._starts)} tokens first")
        self._claim([tokens] * self.batch, tokens)

    def write(self, k: Tensor, v: Tensor) -> None:
        """The device's share of appending one token, `k, v [batch, 1, kv_heads, head_dim]`, that `claim` made room for.

        Fixed shapes and addresses, nothing read back: safe to capture in a CUDA graph or to compile.
        """
        self._check_new(k, v)
        if k.shape[1] != 1:
            raise ValueError(f"MoBACache.write: k must hold one token per row, got {k.shape[1]}")
        k, v, rows, at = k[:, 0].detach(), v[:, 0].detach(), self._rows, self.device_lengths.long()
        slot = at if self.starts is None else at + self.starts
        size = self.k_pages.shape[1]
        page = self.table[rows, slot // size].long()
        self.k_pages[page, slot % size] = k
        self.v_pages[page, slot % size] = v
        block = at // self.block_size
        self.sums[rows, block] = self.sums[rows, block] + k
        self.device_lengths += 1

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty `rows` (all by default) and give their pages back. With `starts`, only all rows at once."""
        chosen = range(self.batch) if rows is None else list(rows)
        if any(isinstance(b, bool) or not isinstance(b, int) or not 0 <= b < self.batch for b in chosen):
            raise ValueError(f"MoBACache.reset: rows must be ints in 0..{self.batch - 1}, got {list(chosen)}")
        if self.starts is not None and len(set(chosen)) != self.batch:
            raise ValueError(f"MoBACache.reset: a cache with starts empties all rows at once, got {list(chosen)}")
        for b in chosen:
            self._lengths[b] = 0
            self._free += self._owned[b][::-1]
            self._owned[b] = []
            self.sums[b].zero_()
            self.device_lengths[b] = 0
        self._cursor = 0

    def keys(self, row: int) -> Tensor:
        """`[length, kv_heads, head_dim]` of a row: a view, or a copy where its pages are not neighbours."""
        return self._read(self.k_pages, row)

    def values(self, row: int) -> Tensor:
        """As `keys`."""
        return self._read(self.v_pages, row)

    def centroids(self) -> Tensor:
        """Means of the blocks' keys, `[batch, blocks, kv_heads, head_dim]`; an open block's of those it has."""
        first = torch.arange(self.sums.shape[1], device=self.sums.device) * self.block_size
        count = (self.device_lengths[:, None] - first).clamp(0, self.block_size)
        return self.sums / count.clamp(min=1)[..., None, None]

    def _check_new(self, k: Tensor, v: Tensor) -> None:
        heads, dim = self.k_pages.shape[2:]
        shape = f"[{self.batch}, T, {heads}, {dim}]"
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor):
                raise TypeError(f"MoBACache: {name} must be a Tensor, got {type(x).__name__}")
            if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (self.batch, heads, dim):
                raise ValueError(f"MoBACache: {name} must have shape {shape}, got {list(x.shape)}")
            if x.dtype != self.k_pages.dtype:
                raise TypeError(f"MoBACache: {name} must have the cache's dtype {self.k_pages.dtype}, got {x.dtype}")
            if x.device != self.k_pages.device:
                raise ValueError(f"MoBACache: {name} must be on the cache's {self.k_pages.device}, got {x.device}")
        if v.shape != k.shape:
            raise ValueError(f"MoBACache: v must have k's shape {list(k.shape)}, got {list(v.shape)}")

    def _claim(self, counts: list[int], tokens: int) -> None:
        """Make room for `counts[b]` more tokens in row `b`, or raise and change nothing."""
        grown = [n + more for n, more in zip(self._lengths, counts, strict=True)]
        for b, n in enumerate(grown):
            if self._starts[b] + n > self.capacity:
                raise ValueError(
                    f"MoBACache: row {b} holds {self._lengths[b]} tokens behind {self._starts[b]} of padding, "
                    f"{counts[b]} more pass its capacity of {self.capacity}"
                )
        if self.page_size is not None:
            needed = [cdiv(n, self.page_size) - len(own) for n, own in zip(grown, self._owned, strict=True)]
            if sum(needed) > len(self._free):
                raise ValueError(
                    f"MoBACache: {sum(counts)} more tokens need {sum(needed)} pages of {self.page_size}, "
                    f"{len(self._free)} of {len(self.k_pages)} are free"
                )
            for b, more in enumerate(needed):
                for _ in range(more):
                    self.table[b, len(self._owned[b])] = self._free[-1]
                    self._owned[b].append(self._free.pop())
        self._lengths, self._cursor = grown, self._cursor + tokens

    def _store(self, rows: slice, at: int, k: Tensor, v: Tensor) -> None:
        """Write the same number of tokens into `rows`, behind `at` ones; paged storage takes one row at a time."""
        done, total, size = 0, k.shape[1], self.k_pages.shape[1]
        while done < total:
            slot = self._starts[rows.start] + at + done
            n = min(size - slot % size, total - done)
            page = rows if self.page_size is None else self._owned[rows.start][slot // size]
            self.k_pages[page, slot % size : slot % size + n] = k[:, done : done + n]
            self.v_pages[page, slot % size : slot % size + n] = v[:, done : done + n]
            done += n
        self._add(rows, at, k)

    def _add(self, rows: slice, at: int, k: Tensor) -> None:
        """Extend the sums of `rows` by keys that follow `at` ones: the open block, whole blocks, the next open one."""
        size, dtype = self.block_size, self.sums.dtype
        first = min(-at % size, k.shape[1])
        whole = (k.shape[1] - first) // size
        block, end = cdiv(at, size), first + whole * size
        if first:
            self.sums[rows, at // size] += k[:, :first].sum(1, dtype=dtype)
        if whole:
            self.sums[rows, block : block + whole] = k[:, first:end].unflatten(1, (whole, size)).sum(2, dtype=dtype)
        if end < k.shape[1]:
            self.sums[rows, block + whole] = k[:, end:].sum(1, dtype=dtype)

    def _read(self, pages: Tensor, row: int) -> Tensor:
        if self.page_size is None:
            return pages[row, self._starts[row] :][: self._lengths[row]]
        own = self._owned[row]
        first = own[0] if own else 0
        neighbours = own == list(range(first, first + len(own)))
        found = pages[first : first + len(own)] if neighbours else pages[self.table[row, : len(own)].long()]
        return found.flatten(0, 1)[: self._lengths[row]]


def token_counts(fn: str, name: str, lengths: Sequence[int] | Tensor | None, batch: int, tokens: int) -> list[int]:
    if lengths is None:
        return [tokens] * batch
    values = check_ints(fn, name, lengths)
    if len(values) != batch or not all(0 <= n <= tokens for n in values):
        raise ValueError(f"{fn}: {name} must be {batch} ints in 0..{tokens}, got {values}")
    return values
