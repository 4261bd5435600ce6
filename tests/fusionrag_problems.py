"""Problems for `selective_attention`: rows at chosen positions of ragged requests, in every layout of the keys."""

import zlib
from itertools import accumulate, chain

import torch
from torch import Tensor

import attnlab
from attnlab.rope import RopeConfig, shift_rope
from attnlab.testing import assert_accurate, plain_attention

LAYOUTS = ("contiguous", "packed", "pages", "slots")

# lengths of the requests' keys, which rows each has, heads, kv_heads, head_dim
CASES = {
    "sorted": ([150], ["sorted"], 4, 2, 64),
    "unsorted, gqa 3": ([150], ["unsorted"], 3, 1, 80),
    "repeated, gqa 8": ([90], ["repeated"], 8, 1, 32),
    "first and last": ([70], ["ends"], 2, 2, 128),
    "first": ([70], ["first"], 2, 2, 16),
    "last": ([70], ["last"], 4, 2, 32),
    "one row": ([37], ["one"], 2, 2, 32),
    "no rows": ([20], ["none"], 2, 1, 32),
    "all rows": ([70], ["all"], 2, 1, 32),
    "all rows, backwards": ([70], ["reversed"], 2, 1, 32),
    "padding between": ([60], ["holes"], 4, 2, 48),
    "no keys": ([0, 9], ["holes", "holes"], 2, 1, 16),
    "ragged": ([90, 1, 40, 17, 65], ["sorted", "one", "none", "all", "unsorted"], 4, 2, 32),
    "D=256": ([50], ["sorted"], 2, 1, 256),
    "D=5": ([50], ["unsorted"], 2, 1, 5),
}


def rows(kind: str, length: int, g: torch.Generator) -> list[int]:
    some = torch.randperm(length, generator=g)[: max(1, length // 3)].tolist() if length else []
    again = torch.randint(max(length, 1), (length // 2,), generator=g).tolist()
    return {
        "none": [],
        "one": [length // 2],
        "first": [0],
        "last": [length - 1],
        "ends": [length - 1, 0],
        "all": list(range(length)),
        "reversed": list(range(length))[::-1],
        "unsorted": some,
        "sorted": sorted(some),
        "repeated": [0, *again, *again, length - 1, length - 1],
        "holes": [-1, *some, -1, -1, *again, -1],
    }[kind]


class Problem:
    """q, k, v of every request, in float64; `results` and `expected` are lists with an item per request."""

    def __init__(self, case, *, rope: RopeConfig | None = None, seed: int = 0):
        self.lengths, kinds, self.heads, self.kv_heads, self.dim = case
        self.g = torch.Generator().manual_seed(zlib.crc32(repr((case, seed)).encode()))
        self.rows = [rows(kind, n, self.g) if isinstance(kind, str) else kind for kind, n in zip(kinds, self.lengths)]
        self.q = [self.normal(len(at), self.heads) for at in self.rows]
        self.k, self.v = ([self.normal(n, self.kv_heads) for n in self.lengths] for _ in range(2))
        self.rope = rope
        self.shift = [torch.randint(-300, 300, (n,), generator=self.g) for n in self.lengths]

    def normal(self, count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, self.dim, generator=self.g, dtype=torch.float64)

    def expected(self, dtype=torch.float64, rows=None) -> list[tuple[Tensor, Tensor]]:
        """By a mask over all scores, in `dtype`; of other rows if given."""
        found = []
        for q, k, v, at, shift in zip(self.q, self.k, self.v, rows or self.rows, self.shift, strict=True):
            q, k, v = (x.to(dtype)[None] for x in (q, k, v))
            k = k if self.rope is None else shift_rope(k, shift, self.rope)
            seen = torch.arange(k.shape[1]) <= torch.tensor(at, dtype=torch.long)[:, None]
            found.append([x[0] for x in plain_attention(q, k, v, seen)])
        return found

    def arguments(self, layout: str, dtype: torch.dtype, device="cpu", index=torch.int32) -> dict:
        """For `selective_attention`. What no row may read is NaN."""
        if layout == "packed":
            q, k, v = (torch.cat(x)[None] for x in (self.q, self.k, self.v))
            at = torch.tensor([list(chain(*self.rows))], dtype=index)
            cu = {
                name: torch.tensor([0, *accumulate(map(len, x))], dtype=torch.int32)
                for name, x in (("cu_seqlens_q", self.rows), ("cu_seqlens_k", self.k))
            }
            found = dict(positions=at, shift=torch.cat(self.shift)[None], **cu)
        else:
            q = padded(self.q, max(map(len, self.rows)), torch.nan)
            at = padded([torch.tensor(at, dtype=index) for at in self.rows], q.shape[1], -1)
            found = dict(positions=at, lengths=torch.tensor(self.lengths, dtype=torch.int32))
            room = max(self.lengths) + 3
            k, v = (padded(x, room, torch.nan) for x in (self.k, self.v))
            found["shift"] = padded(self.shift, room, 7)
            if layout != "contiguous":
                found["page_table"], k, v = paged(k, v, self.lengths, 1 if layout == "slots" else 4, self.g)
        if self.rope is None:
            del found["shift"]
        found |= {name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))}
        found = {name: x.to(device) for name, x in found.items()}
        return found | ({} if self.rope is None else dict(rope=self.rope))

    def results(self, layout: str, dtype: torch.dtype, device="cpu", index=torch.int32, **options):
        """As `expected`, of the public function; padding is checked to be rows without keys."""
        given = self.arguments(layout, dtype, device, index)
        out, lse = (x.cpu() for x in attnlab.selective_attention(**given, return_lse=True, **options))
        assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
        counts = [len(at) for at in self.rows]
        if layout == "packed":
            return list(zip(out[0].split(counts), lse[0].split(counts), strict=True))
        for o, x, n in zip(out, lse, counts, strict=True):
            assert (o[n:] == 0).all() and (x[n:] == -torch.inf).all()
        return [(o[:n], x[:n]) for o, x, n in zip(out, lse, counts, strict=True)]

    def check(self, layout: str, dtype: torch.dtype, device="cpu", index=torch.int32, **options) -> None:
        found = self.results(layout, dtype, device, index, **options)
        for request, states in enumerate(zip(found, self.expected(), self.expected(dtype), strict=True)):
            for what, got, truth, plain in zip(("out", "lse"), *states, strict=True):
                # An lse of few keys may happen to be exact in plain PyTorch.
                assert_accurate(got, truth, plain, roundings=2, what=f"request {request}: {what}")


def padded(parts: list[Tensor], size: int, value: float) -> Tensor:
    found = parts[0].new_full((len(parts), size, *parts[0].shape[1:]), value)
    for row, x in zip(found, parts, strict=True):
        row[: len(x)] = x
    return found


def paged(k: Tensor, v: Tensor, lengths: list[int], size: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A table of pages in no order, some of which nobody uses, and k and v there. What is unused is NaN."""
    batch, room = k.shape[:2]
    wide = -(-room // size)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, wide * size - room), value=torch.nan) for x in (k, v))
    place = torch.randperm(batch * wide + 5, generator=g)[: batch * wide]
    found = []
    for x in (k, v):
        pool = x.new_full((batch * wide + 5, size, *x.shape[2:]), torch.nan)
        pool[place] = x.reshape(batch * wide, size, *x.shape[2:])
        found.append(pool)
    table = place.view(batch, wide).int()
    used = torch.arange(wide) * size < torch.tensor(lengths)[:, None]
    return table.masked_fill(~used, -(1 << 20)), *found
