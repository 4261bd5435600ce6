"""Decode attention of the C kernels: every layout against a masked softmax in float64, whatever the threads are."""

from dataclasses import dataclass, field

import pytest
import torch

from attnlab.kernels.cpu import lamina, module
from attnlab.kernels.lamina.spec import Cache
from attnlab.lamina import shared_prefix_decode, split_decode
from attnlab.testing import assert_accurate, plain_attention

pytestmark = pytest.mark.skipif(bool(module.missing()), reason="needs the C kernels")

# Keys of each row, queries of each row, Hq, Hkv, D, what else.
CASES = {
    "one row": ([1300], 1, 2, 2, 16, {}),
    "gqa 8, ragged": ([700, 0, 64, 65, 1], 1, 8, 1, 16, {}),
    "gqa 3, D=5": ([130, 257], 1, 6, 2, 5, {}),
    "queries": ([333, 90], 5, 6, 2, 24, {}),
    "many queries": ([600, 0, 513, 70], 30, 2, 2, 17, {}),
    "queries of more than one item": ([520], 300, 4, 2, 8, {}),
    "D=256": ([200, 3], 2, 4, 2, 256, {}),
    "D=80": ([200, 3], 3, 8, 2, 80, {}),
    "many heads": ([150], 1, 48, 48, 40, {}),
    "many splits": ([500, 90], 2, 4, 2, 16, dict(splits=9)),
    "one split": ([700], 2, 4, 2, 16, dict(splits=1)),
    "no keys": ([0, 0], 2, 4, 2, 16, {}),
    "no rows": ([], 2, 4, 2, 16, {}),
    "slots": ([300, 70, 0], 2, 4, 2, 16, dict(page=1)),
    "pages of 7": ([90, 430, 15], 1, 4, 2, 24, dict(page=7)),
    "pages of 600": ([1300, 5], 2, 4, 2, 16, dict(page=600)),
    "many queries, pages": ([90, 530, 15], 40, 2, 2, 24, dict(page=16)),
}
PREFIXED = ["gqa 8, ragged", "queries", "many queries", "no keys", "no rows", "pages of 7", "gqa 3, D=5"]


@dataclass
class Problem:
    """Rows whose keys lie among NaN that belongs to nobody."""

    name: str
    dtype: torch.dtype = torch.float32
    strided: bool = False
    prefix: int = 0
    q: torch.Tensor = field(init=False)

    def __post_init__(self):
        lengths, queries, hq, hkv, self.dim, options = CASES[self.name]
        self.g = torch.Generator().manual_seed(0)
        make = lambda *shape: torch.randn(*shape, generator=self.g, dtype=torch.float64).to(self.dtype)
        self.scale, self.splits = 0.7 * self.dim**-0.5, options.get("splits")
        self.q = make(len(lengths), queries, hq, self.dim)
        self.rows = [(make(n, hkv, self.dim), make(n, hkv, self.dim)) for n in lengths]
        self.shared = make(self.prefix, hkv, self.dim), make(self.prefix, hkv, self.dim)
        page, most = options.get("page"), max(lengths, default=0)
        self.table, pages = None, len(lengths)
        if page:
            wide = -(-most // page) + 1
            pages = len(lengths) * wide + 3
            self.table = torch.randperm(pages, generator=self.g)[: len(lengths) * wide].view(-1, wide).int()
        k, v = (torch.full((pages, page or most + 3, hkv, self.dim), torch.nan, dtype=self.dtype) for _ in "kv")
        for row, both in enumerate(self.rows):
            for x, mine in zip((k, v), both, strict=True):
                for j in range(len(mine) if page else 0):
                    x[self.table[row, j // page], j % page] = mine[j]
                if not page:
                    x[row, : len(mine)] = mine
        if page:
            for row, n in enumerate(lengths):
                self.table[row, -(-n // page) :] = -7
        if self.strided:  # heads first, and gaps in rows that are no whole number of vectors
            k = k.transpose(1, 2).contiguous().transpose(1, 2)
            v = torch.cat([v, v.mul(torch.nan)[..., :3]], -1)[..., : self.dim]
            self.q = torch.stack([self.q, self.q], 1)[:, 1]
        self.cache = Cache(k, v, self.table, torch.tensor(lengths, dtype=torch.int32))

    def run(self, dtype=None):
        options = (self.cache, self.scale, self.splits, dtype or self.dtype)
        if self.prefix:
            return lamina.prefix_decode(self.q, *self.shared, *options)
        return lamina.decode(self.q, *options)

    def expected(self, dtype=torch.float64):
        out = torch.zeros(self.q.shape, dtype=dtype)
        lse = torch.full(self.q.shape[:3], -torch.inf, dtype=dtype)
        for row, both in enumerate(self.rows):
            k, v = (torch.cat(pair)[None].to(dtype) for pair in zip(self.shared, both, strict=True))
            if k.shape[1]:
                seen = torch.ones(k.shape[1], dtype=torch.bool)
                out[row], lse[row] = (
                    x[0] for x in plain_attention(self.q[row, None].to(dtype), k, v, seen, self.scale)
                )
        return out, lse

    def check(self):
        truth = self.expected()
        plain = self.expected(self.dtype)
        for dtype in {self.dtype, torch.float32}:
            out, lse = self.run(dtype)
            assert out.dtype == dtype and lse.dtype == torch.float32
            # Spans are rounded and so is their merge, and the error of `plain` may be small by luck.
            assert_accurate(out, truth[0], plain[0], roundings=2, what="out")
            assert_accurate(lse, truth[1], plain[1], roundings=2, what="lse")


@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("name", CASES)
def test_float32(name, strided):
    Problem(name, strided=strided).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gqa 8, ragged", "gqa 3, D=5", "many queries", "D=80", "pages of 7", "many heads"])
def test_half(name, dtype):
    Problem(name, dtype, strided=True).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", [1, 700])
@pytest.mark.parametrize("name", PREFIXED)
def test_shared_prefix(name, prefix, dtype):
    Problem(name, dtype, prefix=prefix, strided=prefix == 1).check()


@pytest.mark.parametrize("name", CASES)
def test_no_thread_matters(name, monkeypatch):
    monkeypatch.setattr(lamina, "THREAD_BYTES", 1)
    problem, before = Problem(name, prefix=300), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        found.append(problem.run())
    torch.set_num_threads(before)
    for got in found[1:]:
        assert all(map(torch.equal, got, found[0]))


def test_neither_other_rows_nor_head_layout_matter():
    """A row alone, and heads where they lie next to each other or do not, give the same bits."""
    p = Problem("pages of 7")
    assert all(map(torch.equal, p.run(), Problem("pages of 7", strided=True).run()))
    p = Problem("many heads")
    assert all(map(torch.equal, p.run(), Problem("many heads", strided=True).run()))
    p = Problem("queries")
    p.splits = 2
    out, lse = p.run()
    for row in range(2):
        one = Cache(*(x[row, None] for x in p.cache[:2]), None, p.cache.lengths[row, None])
        alone = lamina.decode(p.q[row, None], one, p.scale, 2, torch.float32)
        assert torch.equal(alone[0][0], out[row]) and torch.equal(alone[1][0], lse[row])


@pytest.mark.parametrize("name", ["one row", "many queries"])
def test_huge_scores(name):
    p = Problem(name)
    p.q *= 1e4
    p.check()
    p.scale *= -1
    p.check()


@pytest.mark.parametrize("name", ["gqa 8, ragged", "many queries"])
def test_nan_stays_in_its_query(name):
    p = Problem(name)
    want = p.run()
    p.q[0, -1, 1] = torch.nan
    for got, clean in zip(p.run(), want, strict=True):
        bad = torch.zeros(got.shape[:3], dtype=torch.bool)
        bad[0, -1, 1] = True
        assert got[bad].isnan().all() and torch.equal(got[~bad], clean[~bad])


def test_spans_follow_from_the_shape(monkeypatch):
    """At most `splits` of them; otherwise enough for threads, and few enough for their states to fit."""
    q, k = torch.zeros(2, 3, 4, 8), torch.zeros(2, 100_000, 2, 8)
    spans = lambda splits, n=100_000: lamina._spans(q, Cache(k, k, None, torch.tensor([n // 2, n]).int()), splits)
    assert [spans(n)[1] for n in (1, 3, 7, 100_000)] == [1, 3, 7, 1563]
    span, count = spans(None)
    assert span % lamina.STEP == 0 and lamina.LEAST_SPAN <= span <= lamina.MOST_SPAN and count == -(-100_000 // span)
    assert spans(None, 300) == (span, 1) and spans(None, 0) == (span, 0)
    monkeypatch.setattr(lamina, "PART_BYTES", 4 * 2 * 3 * 4 * 10 * 5)
    assert spans(None)[1] <= 5


@pytest.mark.parametrize("name", ["pages of 7", "many queries, pages"])
@pytest.mark.parametrize("entry", [-1, 10**6, -(2**31)])
def test_a_page_that_does_not_exist_is_an_error(name, entry):
    p = Problem(name)
    p.table[1, 2] = entry
    with pytest.raises(ValueError, match="a block or page that does not exist"):
        p.run()


@pytest.mark.parametrize("name", ["one row", "many queries", "pages of 7"])
def test_keys_that_do_not_exist_are_an_error(name):
    p = Problem(name)
    p.cache = p.cache._replace(lengths=p.cache.lengths + 1000)
    if p.table is not None:
        p.table.clamp_(min=0)
    with pytest.raises(ValueError, match="a block or page that does not exist"):
        p.run()


def test_narrower_vectors(narrower):
    for name in ("gqa 3, D=5", "queries", "many queries", "D=80", "pages of 7"):
        Problem(name).check()
        Problem(name, torch.float16, prefix=70).check()


def test_public_functions():
    p = Problem("pages of 7", prefix=40)
    given = dict(lengths=p.cache.lengths, page_table=p.table.clamp(min=0), scale=p.scale)
    got = shared_prefix_decode(p.q, *p.shared, *p.cache[:2], **given, backend="cpu")
    torch.testing.assert_close(got, tuple(x.float() for x in p.expected()), rtol=1e-5, atol=1e-5)
    got = split_decode(p.q, *p.cache[:2], **given, splits=2, backend="cpu")
    want = split_decode(p.q.double(), *(x.double() for x in p.cache[:2]), **given, backend="reference")
    torch.testing.assert_close(got, tuple(x.float() for x in want), rtol=1e-5, atol=1e-5)
