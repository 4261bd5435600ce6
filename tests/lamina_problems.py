"""Rows to decode, whose keys lie among NaN that belongs to nobody, and what a masked softmax makes of them."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.testing import assert_accurate, plain_attention


class Case(NamedTuple):
    """`lengths` keys of each row; with `page` behind a table; with `prefix` keys that all rows see first."""

    lengths: list[int]
    tq: int = 1
    hq: int = 2
    hkv: int = 1
    d: int = 16
    page: int | None = None
    prefix: int | None = None
    room: int = 0
    scale: float | None = None
    heads_first: bool = False


RAGGED = [70, 0, 33, 1, 64]
CASES = {
    "one row": Case([37]),
    "one key": Case([1], hq=4, hkv=2),
    "full": Case([48, 48], tq=3, hq=4, hkv=2, d=40),
    "ragged": Case(RAGGED, hq=4, hkv=2, d=40, room=70),
    "ragged, 3 queries": Case(RAGGED, tq=3, hq=2, hkv=2, room=71),
    "heads first": Case([33, 50], hq=4, hkv=2, d=40, heads_first=True, room=60),
    "group of 8": Case([90, 17], hq=8, d=64),
    "group of 8, 3 queries": Case([40, 20], tq=3, hq=8, d=16),
    "D=96": Case([50, 20], tq=2, hq=2, d=96),
    "slots": Case(RAGGED, hq=4, hkv=2, page=1),
    "pages of 5": Case(RAGGED, tq=3, hq=2, d=40, page=5),
    "pages of 16": Case(RAGGED, hq=8, hkv=2, page=16),
    "pages of 64": Case([100, 64, 0, 65], tq=3, hq=2, page=64, heads_first=True),
    "no key at all": Case([0, 0], room=5),
    "no room": Case([0, 0]),
    "no pages": Case([0, 0], page=4),
    "negative scale": Case([60, 3], tq=2, scale=-1.0, page=16),
    "large scale": Case([60, 3], hq=4, hkv=2, scale=1.5),
    "prefix": Case([20, 0, 33], tq=2, hq=4, hkv=2, d=40, prefix=50, room=40),
    "prefix, many rows": Case([2] * 5, tq=5, hq=3, prefix=37),
    "prefix, pages": Case([20, 0, 33], hq=8, page=5, prefix=16, scale=-0.3),
    "prefix of 0": Case([20, 33], prefix=0),
    "prefix, tails of 0": Case([0, 0], tq=2, prefix=40),
    "prefix of 0, tails of 0": Case([0, 0], prefix=0),
}  # fmt: skip


class Problem:
    """`tensors` and `options` are what the public function takes: `split_decode`, or with a prefix the other one."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0):
        c, self.case, self.known = case, case, {}
        g = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        q = make(c.hq, len(c.lengths), c.tq, c.d).permute(1, 2, 0, 3)  # strided on purpose
        self.own = [(make(n, c.hkv, c.d), make(n, c.hkv, c.d)) for n in c.lengths]
        self.prefix = make(2, c.prefix or 0, c.hkv, c.d).unbind()
        place = self._contiguous if c.page is None else self._paged
        k, v = (place([x[i] for x in self.own], torch.Generator().manual_seed(1)) for i in range(2))
        if c.heads_first:
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        v = torch.cat([v, torch.full_like(v, math.nan)], -1)[..., : c.d]  # its strides are not those of k
        self.options = {} if c.scale is None else {"scale": c.scale}
        if c.page is not None or c.room or len(set(c.lengths)) > 1:
            self.options["lengths"] = torch.tensor(c.lengths, dtype=torch.int32, device=device)
        if c.page is not None:
            self.options["page_table"] = self.table.to(device)
        shared = () if c.prefix is None else self.prefix
        self.tensors = [x.to(device) for x in (q, *shared, k, v)]

    def _contiguous(self, rows: list[Tensor], g: torch.Generator) -> Tensor:
        room = max(self.case.room, *self.case.lengths)
        return torch.stack([F.pad(x, (0, 0, 0, 0, 0, room - len(x)), value=math.nan) for x in rows])

    def _paged(self, rows: list[Tensor], g: torch.Generator) -> Tensor:
        """Pages in no order, some of which nobody uses; entries of the table past a row's keys name none."""
        size = self.case.page
        counts = [-(-len(x) // size) for x in rows]
        free = torch.randperm(sum(counts) + 2, generator=g).int()
        pool = rows[0].new_full((len(free), size, *rows[0].shape[1:]), math.nan)
        table = torch.full((len(rows), max(counts) + 2), -(1 << 20), dtype=torch.int32)
        for i, x in enumerate(rows):
            table[i, : counts[i]] = free[sum(counts[:i]) : sum(counts[: i + 1])]
            for j, key in enumerate(x):
                pool[table[i, j // size], j % size] = key
        self.table = table[:, : max(counts) + 1]  # rows of the table lie further apart than it is wide
        return pool

    def expected(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        if dtype not in self.known:
            self.known[dtype] = self._expected(dtype)
        return self.known[dtype]

    def _expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q = self.tensors[0].cpu()
        rows = []
        for b, own in enumerate(self.own):
            k, v = (torch.cat(x)[None].to(dtype) for x in zip(self.prefix, own, strict=True))
            seen = torch.ones(max(1, k.shape[1]), dtype=torch.bool)
            if not k.shape[1]:  # no softmax over nothing
                k, v, seen = k.new_zeros(1, 1, *k.shape[2:]), k.new_zeros(1, 1, *k.shape[2:]), ~seen
            rows.append(plain_attention(q[b : b + 1].to(dtype), k, v, seen, self.case.scale))
        out, lse = (torch.cat(x) for x in zip(*rows, strict=True))
        return out, lse

    def check(self, got: tuple[Tensor, Tensor], roundings: float = 2) -> None:
        dtype = self.tensors[0].dtype
        out, lse = (x.cpu() for x in got)
        assert (out.dtype, lse.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
        for what, *x in zip(("out", "lse"), (out, lse), self.expected(), self.expected(dtype), strict=True):
            assert_accurate(*x, roundings=roundings, what=what)
        assert out[lse == -math.inf].eq(0).all()
