"""Selective attention of the C kernels: every layout against a masked softmax in float64, whatever the threads are."""

import pytest
import torch

from attnlab.fusionrag.attention import selective_attention
from attnlab.kernels.cpu import fusionrag, module
from attnlab.kernels.fusionrag.spec import Keys
from attnlab.rope import RopeConfig, shift_rope
from attnlab.testing import assert_accurate, plain_attention

# Keys of each request, rows of each request, Hq, Hkv, D, what else.
CASES = {
    "rows over tiles of keys": ([1300], [700], 2, 2, 16, {}),
    "gqa 3": ([90, 70], [60, 66], 6, 2, 24, {}),
    "gqa 8, a request without rows, one without keys": ([40, 30, 0, 5], [40, 0, 3, 70], 8, 1, 16, {}),
    "decode": ([2100, 1, 513, 0], [1, 1, 1, 1], 4, 2, 40, {}),
    "few rows, many heads": ([1500], [3], 8, 4, 17, {}),
    "rows split by keys": ([1100, 2050], [20, 33], 4, 2, 16, {}),
    "rows split by rows": ([300, 1400], [550, 530], 2, 1, 8, {}),
    "all sorts": ([700, 1, 1800, 64], [600, 1, 2, 90], 4, 4, 8, {}),
    "D=256": ([200], [50], 2, 1, 256, {}),
    "D=5": ([600], [9], 3, 1, 5, {}),
    "slots": ([1300, 70, 0], [70, 3, 1], 4, 2, 16, dict(page=1)),
    "pages of 7": ([90, 1030, 15], [5, 70, 15], 2, 2, 24, dict(page=7)),
    "pages of 600": ([1300], [1], 4, 2, 16, dict(page=600)),
    "turned": ([600, 50], [70, 2], 4, 2, 24, dict(rotary=24)),
    "turned in part": ([600, 1050], [2, 70], 2, 2, 40, dict(rotary=12)),
    "turned, interleaved": ([600, 1050], [2, 70], 2, 2, 40, dict(rotary=40, interleaved=True)),
    "turned, interleaved, in part": ([300], [70], 2, 2, 40, dict(rotary=6, interleaved=True)),
    "turned, more pairs than a run": ([70], [10], 1, 1, 300, dict(rotary=280)),
    "turned slots": ([600, 90], [70, 2], 4, 2, 16, dict(page=1, rotary=16)),
    "turned pages": ([100, 600], [90, 2], 4, 2, 16, dict(page=16, rotary=8, interleaved=True)),
}


class Problem:
    """Requests whose keys lie anywhere, among NaN that belongs to nobody. `q [Nq, Hq, D]`, `k, v [S][Tk, Hkv, D]`."""

    def __init__(self, case, dtype=torch.float32, strided=False, seed=0):
        lengths, rows, hq, hkv, dim, options = case
        g = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        self.scale = 0.7 * dim**-0.5
        self.q, self.k, self.v = make(sum(rows), hq, dim), *([make(n, hkv, dim) for n in lengths] for _ in "kv")
        self.cu_q = torch.tensor([0, *rows]).cumsum(0).int()
        drawn = [torch.randint(-1, max(n, 1), (m,), generator=g) for n, m in zip(lengths, rows, strict=True)]
        for n, x in zip(lengths, drawn, strict=True):
            x[:] = x.clamp(max=n - 1)
            x[-1:] = n - 1
        self.positions = torch.cat(drawn).int()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.turned, cos, sin, starts = self.k, None, None, [3 + sum(lengths[:i]) + 5 * i for i in range(len(lengths))]
        total = starts[-1] + lengths[-1] + 4
        rotary, interleaved = options.get("rotary", 0), options.get("interleaved", False)
        if rotary:
            rope, shifts = RopeConfig(100.0, dim, rotary, interleaved), [torch.arange(n) % 97 - 40 for n in lengths]
            self.turned = [shift_rope(k[None], s, rope)[0] for k, s in zip(self.k, shifts, strict=True)]
            angles = torch.full((total, rotary // 2), torch.nan)
            for start, shift in zip(starts, shifts, strict=True):
                angles[start : start + len(shift)] = shift[:, None].float() * rope.inverse_frequencies()
            cos, sin = angles.cos(), angles.sin()
        place = self.paged if "page" in options else self.packed
        self.table = None
        k, v = place(self.k, starts, total, options, g), place(self.v, starts, total, options, g)
        if strided:
            k = k.transpose(-3, -2).contiguous().transpose(-3, -2)
            v = torch.stack([v, v.mul(torch.nan)], -2)[..., 0, :]
            self.q = torch.stack([self.q, self.q], 1)[:, 1]
        self.keys = Keys(k, v, self.table, torch.tensor(starts), self.lengths, cos, sin, interleaved)

    def packed(self, rows, starts, total, options, g):
        x = torch.full((total, *rows[0].shape[1:]), torch.nan, dtype=rows[0].dtype)
        for start, row in zip(starts, rows, strict=True):
            x[start : start + len(row)] = row
        return x

    def paged(self, rows, starts, total, options, g):
        page = options["page"]
        needed = [-(-len(row) // page) for row in rows]
        x = torch.full((sum(needed) + 3, page, *rows[0].shape[1:]), torch.nan, dtype=rows[0].dtype)
        if self.table is None:
            self.free = torch.randperm(len(x), generator=g)
            self.table = torch.full((len(rows), max(needed) + 1), -7, dtype=torch.int32)
        at = 0
        for i, (row, n) in enumerate(zip(rows, needed, strict=True)):
            self.table[i, :n] = self.free[at : at + n]
            for j in range(len(row)):
                x[self.free[at + j // page], j % page] = row[j]
            at += n
        return x

    def forward(self):
        return fusionrag.forward(self.q, self.keys, self.positions, self.cu_q, self.scale)

    def expected(self, dtype=torch.float64):
        outs, lses = [], []
        for i, (k, v) in enumerate(zip(self.turned, self.v, strict=True)):
            rows = slice(*self.cu_q[i : i + 2])
            mask = torch.arange(len(k)) <= self.positions[rows, None]
            if not len(k):
                k, v, mask = (torch.zeros(1, *k.shape[1:]), torch.zeros(1, *k.shape[1:]), mask.new_zeros(len(mask), 1))
            x = (t[None].to(dtype) for t in (self.q[rows], k, v))
            out, lse = plain_attention(*x, mask, self.scale)
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses)


def check(name, dtype=torch.float32, strided=False):
    p = Problem(CASES[name], dtype, strided)
    got, truth, plain = p.forward(), p.expected(), p.expected(dtype)
    assert (got[0].dtype, got[1].dtype) == (dtype, torch.float32)
    for what, *x in zip(("out", "lse"), got, truth, plain, strict=True):
        # An lse of few keys may happen to be exact in plain PyTorch.
        assert_accurate(*x, roundings=2, what=f"{name}: {what}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, dtype):
    check(name, dtype, strided=dtype == torch.bfloat16)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [6, 12], ids=["few rows", "packed"])
def test_turning_rounds_as_torch_does(dim, dtype, interleaved):
    """The lse of a single key under a one-hot query is an element of that key: subnormal ones and ties included."""
    n, g = 600, torch.Generator().manual_seed(0)
    size = 10 ** (torch.rand(n, 1, 1, generator=g) * 11 - 8)
    k = (torch.randn(n, 1, dim, generator=g) * size).to(dtype)
    angles = torch.rand(n, dim // 2 - 1, generator=g) * 100
    cos, sin = angles.cos(), angles.sin()
    cos[::2], sin[::2] = 1.5, 0.0
    cos[::4] = 0.5
    turns = k[:, 0, : dim - 2].float()
    a, b = (turns[:, ::2], turns[:, 1::2]) if interleaved else turns.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(1) if interleaved else torch.cat(pair, -1)
    want = torch.cat([turned.to(dtype), k[:, 0, dim - 2 :]], -1).float()
    keys = Keys(k, k, None, torch.arange(n), torch.ones(n, dtype=torch.int32), cos, sin, interleaved)
    q, cu = torch.eye(dim, dtype=dtype).repeat(n, 1)[:, None], torch.arange(0, n * dim + 1, dim, dtype=torch.int32)
    _, lse = fusionrag.forward(q, keys, torch.zeros(n * dim, dtype=torch.int32), cu, 1.0)
    assert torch.equal(lse.view(n, dim), want)


@pytest.mark.parametrize("name", ["rows split by keys", "rows split by rows", "decode", "all sorts", "turned slots"])
def test_threads_change_no_bit(name, monkeypatch):
    p = Problem(CASES[name])
    want, before = p.forward(), torch.get_num_threads()
    try:
        for threads, least in ((1, 256), (3, 256), (300, 256), (2, 16), (64, 1)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(fusionrag, "LEAST_ROWS", least)
            assert all(map(torch.equal, p.forward(), want))
    finally:
        torch.set_num_threads(before)


def test_rows_in_any_order():
    p = Problem(CASES["rows over tiles of keys"])
    want, order = p.forward(), torch.randperm(len(p.q))
    p.q, p.positions = p.q[order], p.positions[order]
    assert all(torch.equal(a, b[order]) for a, b in zip(p.forward(), want, strict=True))


def test_states_to_merge_are_bounded(monkeypatch):
    p, sizes = Problem(CASES["rows split by keys"]), []
    real = module.call
    monkeypatch.setattr(fusionrag, "call", lambda name, *x: sizes.append(x[15]) or real(name, *x))
    whole = p.forward()
    monkeypatch.setattr(fusionrag, "PART_BYTES", 4 * 33 * 2 * 4 * 18)
    bounded = p.forward()
    monkeypatch.setattr(fusionrag, "PART_BYTES", 0)
    none = p.forward()
    assert [None if x is None else len(x) for x in sizes] == [2 * 20 + 3 * 33, 2 * 33, None]
    for got in (bounded, none):
        torch.testing.assert_close(got, whole)


@pytest.mark.parametrize("rows", [1, 40], ids=["few", "many"])
@pytest.mark.parametrize("entry", [-1, 10**6, -(2**31)])
def test_a_page_that_does_not_exist_is_an_error(rows, entry):
    p = Problem(([90], [rows], 2, 1, 8, dict(page=16)))
    p.keys.table[0, 2] = entry
    with pytest.raises(ValueError, match="a block or page that does not exist"):
        p.forward()


@pytest.mark.parametrize(("options", "position"), [({}, 500), (dict(page=16), 120)], ids=["packed", "paged"])
def test_keys_that_do_not_exist_are_an_error(options, position):
    """Past all keys, and past a request's table where the next one's begins."""
    p = Problem(([90, 90], [1, 1], 2, 1, 8, options))
    if p.table is not None:
        p.table.clamp_(min=0)
    p.positions[0] = position
    keys = p.keys._replace(lengths=p.lengths + 1000)
    with pytest.raises(ValueError, match="a block or page that does not exist"):
        fusionrag.forward(p.q, keys, p.positions, p.cu_q, p.scale)


def test_a_position_past_the_end_sees_the_end():
    p = Problem(([90, 40], [3, 30], 2, 1, 8, {}))
    want = p.forward()
    p.positions[p.cu_q[1:] - 1] += 7
    assert all(map(torch.equal, p.forward(), want))


def test_no_rows():
    p = Problem(([90], [0], 2, 1, 8, {}))
    out, lse = p.forward()
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2)


def test_narrower_vectors(narrower):
    for name in ("gqa 3", "few rows, many heads", "D=5", "rows split by keys", "turned pages"):
        check(name)
    test_turning_rounds_as_torch_does(12, torch.float32, False)


def test_public_function():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 16, generator=g) for n, h in ((20, 4), (90, 2), (90, 2)))
    positions = torch.randint(-1, 60, (2, 20), generator=g)
    lengths = torch.tensor([60, 90], dtype=torch.int32)
    shift, rope = torch.randint(-50, 50, (2, 90), generator=g), RopeConfig(1e4, 16)
    options = dict(lengths=lengths, shift=shift, rope=rope, return_lse=True)
    want = selective_attention(q.double(), k.double(), v.double(), positions, backend="reference", **options)
    got = selective_attention(q, k, v, positions, backend="cpu", **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
