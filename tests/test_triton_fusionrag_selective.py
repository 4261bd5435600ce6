"""Selective attention on Triton against a masked softmax in float64, over every layout of keys.

Without a GPU Triton interprets, where bfloat16 is wrong: float16 and float32 here, bfloat16 on a GPU.
"""

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from attnlab.fusionrag import selective_attention
from attnlab.kernels import configs
from attnlab.kernels.fusionrag import selective as module
from attnlab.kernels.fusionrag.launch import forward
from attnlab.kernels.fusionrag.spec import Keys
from attnlab.kernels.states import merge as merge_module
from attnlab.reference.rope import default_frequencies, shift_rope
from attnlab.rope import RopeConfig
from attnlab.testing import assert_accurate, plain_attention, ragged

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
BLOCK_M, BLOCK_N = 32, 16
NAN = math.nan


class Case(NamedTuple):
    """`positions` of each request's rows, in the order they are given, and how its `lengths` keys lie."""

    positions: list[list[int]]
    lengths: list[int]
    hq: int = 2
    hkv: int = 1
    d: int = 32
    page: int | None = None
    scale: float = 0.25
    splits: int = 1
    rotary: int = 0
    interleaved: bool = False


class Made(NamedTuple):
    q: Tensor
    keys: Keys
    positions: Tensor
    cu_q: Tensor
    own: list[tuple[Tensor, Tensor]]  # keys, turned and rounded, and values of each request


RAGGED = [[5, 40, 40, 0, 63, 17], [], [2, -1, 0, -1, 1], [-1], [36, 11, -1, 35, 15, 16]]
LENGTHS = [64, 9, 3, 0, 37]
CASES = {
    "every_row": Case([[*range(50)]], [50], hq=2, hkv=2),
    "spread": Case([[3, 90, 31, 32, 15, 47, 91, 16, 64, 0, 48, 30]], [92], hq=3),
    "padded": Case([[-1] * 9 + [70, 30, 34, 70, 71, 90, 35]], [91], hq=2),
    "long_among_short": Case([[1], [*range(50)], [3], [5, 0], [1]], [9, 50, 9, 9, 9], d=16),
    "ragged": Case(RAGGED, LENGTHS, hq=4, hkv=2, d=40),
    "ragged_pages": Case(RAGGED, LENGTHS, hq=3, d=20, page=5, splits=3),
    "ragged_slots": Case(RAGGED, LENGTHS, hq=8, d=16, page=1, splits=2),
    "whole_pages": Case([[99, 48, 31, 64], [40, 0, 37]], [100, 41], hq=6, hkv=2, page=32, splits=2),
    "page_of_a_tile": Case([[99, 48, 31, 64]], [100], hq=2, page=BLOCK_N, scale=-6.0),
    "wide_head": Case([[20, 3, 21]], [22], hq=2, hkv=2, d=130, page=1, scale=-0.2),
    "one_row_each": Case([[80], [-1], [0], [33]], [81, 70, 1, 40], hq=4, hkv=2, page=1, splits=4),
    "zero_scale": Case([[40, 12]], [41], scale=0.0, splits=2),
    "turned": Case([[3, 50, 31, 32, 17]], [51], hq=2, hkv=2, rotary=32, splits=2),
    "turned_part": Case(RAGGED, LENGTHS, hq=2, d=26, rotary=12, page=1),
    "turned_odd": Case([[33, 20, 2]], [34], d=37, rotary=20, page=3),
    "interleaved": Case(RAGGED, LENGTHS, hq=2, d=24, rotary=24, interleaved=True, page=1, splits=2),
    "interleaved_part": Case([[33, 20, 2]], [34], d=17, rotary=8, interleaved=True),
    "head_64": Case([[70, 2, 33]], [71], hq=8, d=64, splits=2),
    "head_128": Case([[70, 2, 33], [40]], [71, 41], hq=3, d=128, page=1),
    "head_256": Case([[70, 2, 33]], [71], hq=4, hkv=2, d=256, page=BLOCK_N),
    "head_256_turned": Case([[33, 20, 2]], [34], d=256, rotary=256, page=1),
    "turned_small": Case([[33, 20, 2]], [34], d=16, rotary=16),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Tiles so small that short requests run through both phases; few rows are fewer, and requests come in pairs."""
    if "production" not in request.fixturenames:
        real = configs.get
        small = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
        monkeypatch.setattr(configs, "get", lambda name, *key: real(name, *key) | (small if "fusion" in name else {}))
        monkeypatch.setattr(module, "FEW", 4)
        monkeypatch.setattr(module, "MOST_S", 2)


@pytest.fixture
def production():
    """Keeps the tiles as they are."""


def scattered(own: list[Tensor], page: int | None, g: torch.Generator) -> tuple[Tensor, Tensor | None, list[int]]:
    """Requests' rows in a tensor of NaN: between others, or in pages that a table finds, and where the rows begin."""
    starts = [3 + 2 * i + sum(len(x) for x in own[:i]) for i in range(len(own))]
    if page is None:
        pool = torch.full((sum(len(x) + 2 for x in own) + 3, *own[0].shape[1:]), NAN, dtype=own[0].dtype)
        for start, x in zip(starts, own, strict=True):
            pool[start : start + len(x)] = x
        return pool, None, starts
    counts = [-(-len(x) // page) for x in own]
    free = torch.randperm(sum(counts) + 1, generator=g).int()
    pool = torch.full((sum(counts) + 1, page, *own[0].shape[1:]), NAN, dtype=own[0].dtype)
    table = free[-1].repeat(len(own), max(counts) + 2)  # what nobody may look up is a page of NaN
    for i, x in enumerate(own):
        table[i, : counts[i]] = free[sum(counts[:i]) : sum(counts[: i + 1])]
        for j, row in enumerate(x):
            pool[table[i, j // page], j % page] = row
    return pool, table[:, : max(counts)], starts  # rows of the table lie further apart than it is wide


def make(c: Case, dtype: torch.dtype, device: torch.device) -> Made:
    g = torch.Generator().manual_seed(0)
    rows, cu_q = [p for request in c.positions for p in request], ragged([len(x) for x in c.positions])[0]
    q = torch.randn(c.hq, len(rows), c.d, generator=g).to(dtype).transpose(0, 1)  # strided on purpose
    q[torch.tensor(rows) < 0] = NAN
    own = [torch.randn(2, n, c.hkv, c.d, generator=g).to(dtype) for n in c.lengths]
    k, table, starts = scattered([x[0] for x in own], c.page, torch.Generator().manual_seed(1))
    v, *_ = scattered([x[1] for x in own], c.page, torch.Generator().manual_seed(1))
    v = torch.cat([v, torch.full_like(v, NAN)], -1)[..., : c.d]  # its strides are not those of k
    cos = sin = None
    if c.rotary:
        frequencies = default_frequencies(100.0, c.rotary)
        shift = [torch.randint(-200, 200, (n,), generator=g) for n in c.lengths]
        turn = [s.double()[:, None] * torch.tensor(frequencies, dtype=torch.float64) for s in shift]
        cos, sin = (scattered([f(x).float() for x in turn], None, g)[0].to(device) for f in (torch.cos, torch.sin))
        own = [
            (shift_rope(x[0][None].double(), s, frequencies, c.interleaved)[0].to(dtype), x[1]) if len(s) else x
            for x, s in zip(own, shift, strict=True)
        ]
    where = torch.tensor(starts), torch.tensor(c.lengths, dtype=torch.int32)
    table = None if table is None else table.to(device)
    keys = Keys(k.to(device), v.to(device), table, *(x.to(device) for x in where), cos, sin, c.interleaved)
    positions = torch.tensor(rows, dtype=torch.int32)
    return Made(q.to(device), keys, positions.to(device), cu_q.to(device), [(x[0], x[1]) for x in own])


def expected(x: Made, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse of all rows by an explicit mask."""
    q, positions, cu = x.q.cpu().nan_to_num(), x.positions.cpu(), x.cu_q.tolist()
    found = []
    for (k, v), a, b in zip(x.own, cu, cu[1:], strict=False):
        if len(k) == 0:  # no softmax over nothing
            k, v = torch.zeros(2, 1, *k.shape[1:])
        seen = torch.arange(len(k)) <= positions[a:b, None]
        found.append(plain_attention(*(y[None].to(dtype) for y in (q[a:b], k, v)), seen, scale))
    out, lse = (torch.cat([y[0] for y in z]) for z in zip(*found, strict=True))
    return out, lse


def check(x: Made, got: tuple[Tensor, Tensor], scale: float) -> None:
    truth, plain = (expected(x, scale, dtype) for dtype in (torch.float64, x.q.dtype))
    out, lse = (y.cpu() for y in got)
    assert out.dtype == x.q.dtype and lse.dtype == torch.float32
    assert_accurate(out, truth[0], plain[0], what="out")
    assert_accurate(lse, truth[1], plain[1], what="lse")
    assert out[x.positions.cpu() < 0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward(name, dtype, device, monkeypatch):
    c = CASES[name]
    monkeypatch.setattr(module, "shares", lambda *_: c.splits)
    x = make(c, dtype, device)
    got = forward(*x[:4], c.scale)
    check(x, got, c.scale)
    if name in ("ragged_pages", "interleaved"):
        assert all(a.equal(b) for a, b in zip(forward(*x[:4], c.scale), got, strict=True))


def test_order_of_rows_changes_nothing(device, monkeypatch):
    """Rows come back where they were, whatever their order: bit for bit, as the same tiles do the work."""
    monkeypatch.setattr(module, "shares", lambda *_: 1)
    c = CASES["spread"]
    x = make(c, torch.float32, device)
    out, lse = forward(*x[:4], c.scale)
    order = torch.randperm(len(x.positions), generator=torch.Generator().manual_seed(3)).to(device)
    again = forward(x.q[order], x.keys, x.positions[order], x.cu_q, c.scale)
    assert again[0].equal(out[order]) and again[1].equal(lse[order])


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts calls of the interpreter")
@pytest.mark.parametrize("splits", [1, 3])
def test_key_tiles_follow_from_positions(splits, device, monkeypatch):
    """Each tile of sorted rows takes all keys before its first position without a mask, and none after its last."""
    calls = Counter()
    real = module.softmax_step
    monkeypatch.setattr(module, "shares", lambda *_: splits)
    monkeypatch.setattr(module, "softmax_step", lambda *x: calls.update([bool(x[6])]) or real(*x))
    positions = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:30].tolist()
    c = Case([positions, [-1, 47, 50, -1]], [96, 80], hq=4, hkv=2)
    x = make(c, torch.float16, device)
    check(x, forward(*x[:4], c.scale), c.scale)
    tokens = BLOCK_M // (c.hq // c.hkv)
    tiles = [sorted(positions)[i : i + tokens] for i in range(0, 30, tokens)] + [[47, 50]]
    whole = sum((min(t) + 1) // BLOCK_N for t in tiles) * c.hkv
    assert calls == {False: whole, True: sum(-(-(max(t) + 1) // BLOCK_N) for t in tiles) * c.hkv - whole}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts calls of the interpreter")
def test_long_tiles_come_first(device, monkeypatch):
    """Programs take a request's tiles from its last row on."""
    work, real_tile, real_step = [], module.find_tile, module.softmax_step
    monkeypatch.setattr(module, "shares", lambda *_: 1)
    monkeypatch.setattr(module, "find_tile", lambda *x: work.append(0) or real_tile(*x))
    monkeypatch.setattr(module, "softmax_step", lambda *x: work.__setitem__(-1, work[-1] + 1) or real_step(*x))
    c = Case([[*range(0, 96, 2)]], [96], hq=4, hkv=2)
    x = make(c, torch.float16, device)
    forward(*x[:4], c.scale)
    while not work[0]:  # there may be fewer tiles than programs
        work.pop(0)
    assert work == sorted(work, reverse=True) and len(work) == 6 and work[0] > work[-1] > 0


@pytest.mark.parametrize("paged", [False, True])
def test_opcheck(paged, device):
    q, k = torch.randn(4, 2, 16, device=device), torch.randn(12, 1, 16, device=device)
    at = torch.tensor([[5, -1], [0, 3]], device=device)
    steps = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2, 4], [0, 6, 12]))
    lengths = torch.tensor([6, 4], dtype=torch.int32, device=device)
    turns = torch.randn(2, 12, 8, device=device).unbind()
    table = torch.arange(12, dtype=torch.int32, device=device).view(2, 6) if paged else None
    pools = [k[:, None], k[:, None]] if paged else [k.requires_grad_(), k.clone().requires_grad_()]
    options = (6, 6, False, 0.3, False, False, "triton")
    op = torch.ops.attnlab.selective_attention.default
    torch.library.opcheck(op, (q, *pools, at, *steps, table, lengths, *turns, *options))


class Recorder:
    """Stands for a kernel: notes its launches instead of running."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid[0], args, kwargs))


LAUNCHES = {
    # rows, requests, keys, query heads, KV heads, page: programs and splits on the interpreter's four processors
    "recompute": ((4915, 1, 32768, 32, 8, 1), (4915 * 4 // 128 + 1) * 8, 1, 128, "slots"),
    "batch": ((400, 8, 8192, 8, 8, 128), (400 // 128 + 8) * 8, 1, 128, "pages"),
    "question": ((20, 1, 4096, 4, 1, 16), 1 * 8, 8, 128, "slots"),
    "decode": ((2, 2, 4096, 8, 2, None), 4 * 2, 2, 16, "rows"),
    "many_requests": ((9000, 9000, 4, 4, 2, 1), (9000 * 2 // 16 + 9000) * 2, 1, 16, "slots"),
    "nothing_to_share": ((1, 1, 40, 1, 1, None), 1, 1, 16, "rows"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_shapes_decide_the_launch(name, production, monkeypatch):
    (rows, requests, length, hq, hkv, page), programs, splits, block_m, layout = LAUNCHES[name]
    attend, merge = Recorder(), Recorder()
    monkeypatch.setattr(module, "selective_kernel", attend)
    monkeypatch.setattr(merge_module, "merge_kernel", merge)
    shape = (requests * length, hkv, 128) if page is None else (requests * length // page, page, hkv, 128)
    k, lengths = torch.zeros(shape, dtype=torch.float16), torch.zeros(requests, dtype=torch.int32)
    table = None if page is None else torch.zeros(requests, length // page, dtype=torch.int32)
    q, cu_q = torch.zeros(rows, hq, 128, dtype=torch.float16), torch.zeros(requests + 1, dtype=torch.int32)
    positions, keys = torch.zeros(rows, dtype=torch.int32), Keys(k, k, table, lengths.long(), lengths)
    with monkeypatch.context() as patch:  # nothing is read on the host
        for read in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__", "__iter__"):
            patch.setattr(Tensor, read, None)
        out, lse = forward(q, keys, positions, cu_q, 0.1)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == q.shape[:2]
    ((grid, _, constants),) = attend.launches
    assert (grid, constants["BLOCK_M"], constants["LAYOUT"]) == (programs, block_m, layout)
    assert constants["SORTED"] == (rows > requests) and constants["BLOCK_S"] <= 256
    assert [args[0].dtype for _, args, _ in merge.launches] == [torch.float32] * (splits > 1)  # rounded once


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged_slots", "one_row_each"])
def test_graph_reads_positions_anew(name, device):
    c = CASES[name]
    x = make(c, torch.float16, device)
    forward(*x[:4], c.scale)  # compiled before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward(*x[:4], c.scale)
    for positions in (x.positions.clone(), (x.positions // 2).clamp(min=-1)):
        x.positions.copy_(positions)
        graph.replay()
        check(x, got, c.scale)


@pytest.mark.parametrize("requests", [0, 2])
def test_no_rows(requests, device):
    x = make(Case([[0]], [3]), torch.float16, device)
    cu_q = torch.zeros(requests + 1, dtype=torch.int32, device=device)
    keys = x.keys._replace(starts=x.keys.starts.repeat(requests), lengths=x.keys.lengths.repeat(requests))
    out, lse = forward(x.q[:0], keys, x.positions[:0], cu_q, 1.0)
    assert out.shape == (0, 2, 32) and out.dtype == torch.float16 and lse.shape == (0, 2)


@pytest.mark.parametrize("table", [False, True])
def test_far_keys(table, device):
    """Keys whose offset does not fit 31 bits, in memory that is hardly touched."""
    far = 2**26
    k, v = torch.empty(far + 24, 2, 1, 16, dtype=torch.float16, device=device).unbind(1)
    q, *own = torch.randn(3, 24, 1, 16, generator=torch.Generator().manual_seed(0)).half()
    k[far:], v[far:] = (y.to(device) for y in own)
    slots, start, length = (torch.tensor([y], device=device) for y in (range(far, far + 24), far, 24))
    keys = (
        Keys(k[:, None], v[:, None], slots.int(), start, length.int())
        if table
        else Keys(k, v, None, start, length.int())
    )
    positions = torch.tensor([23, 4, 20], dtype=torch.int32, device=device)
    x = Made(q[:3].to(device), keys, positions, torch.tensor([0, 3], dtype=torch.int32, device=device), [tuple(own)])
    check(x, forward(*x[:4], 0.3), 0.3)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("shortcut", ["exact", "bottom_right"])
def test_public_function(shortcut, paged, device):
    """The backend asked for by name answers as the reference does."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 4, 24, generator=g).to(device)
    k, v = torch.randn(2, 2, 40, 2, 24, generator=g).to(device)
    positions = torch.tensor([[39, 3, -1, 17, 3, 38], [-1, 20, 0, -1, 30, 5]], device=device)
    options = dict(lengths=torch.tensor([40, 31], dtype=torch.int32, device=device), mask=shortcut, return_lse=True)
    options |= dict(shift=torch.arange(80, device=device).view(2, 40) * 3, rope=RopeConfig(100.0, 24, 16))
    if paged:
        k, v = k.view(80, 1, 2, 24), v.view(80, 1, 2, 24)
        options["page_table"] = torch.arange(80, dtype=torch.int32, device=device).view(2, 40)
    got = selective_attention(q, k, v, positions, backend="triton", **options)
    truth = selective_attention(q.double(), k.double(), v.double(), positions, backend="reference", **options)
    plain = selective_attention(q, k, v, positions, backend="portable", **options)
    for x, t, p, what in zip(got, truth, plain, ("out", "lse"), strict=True):
        assert_accurate(x, t, p, what=what)
