"""Decode in one Triton launch against attention over explicitly gathered keys in float64.

Without a GPU Triton interprets, where bfloat16 is wrong: float16 and float32 here, bfloat16 on a GPU.
"""

import math

import pytest
import torch

from attnlab.kernels import configs
from attnlab.kernels.moba import decode as module
from attnlab.kernels.moba.spec import Spec, slots
from attnlab.reference.moba import moba_attention, moba_select

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
BOUND = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
CAPACITY = 90

CASES = {
    "contiguous": dict(block=16, topk=3, hq=4, hkv=2, d=32, splits=3, starts=[3, 0, 7]),
    "paged_group": dict(block=16, topk=3, page=8, group=True, sink=1, local=1, sinks=True, hq=6, hkv=2, d=80, splits=2),
    "rounds": dict(block=5, topk=12, hq=1, hkv=1, d=16, splits=2),
    "own_only": dict(block=48, topk=1, hq=2, hkv=1, d=16, splits=1),
    "pages_cut_blocks": dict(block=7, topk=4, page=5, hq=2, hkv=2, d=16, splits=4, starts=[1, 4, 0]),
    "everything": dict(block=100, topk=9, page=16, hq=3, hkv=1, d=16, splits=2),
}
LENGTHS, ROWS = [75, 0, 37, 1], [2, 0, 1, 2]


def cache(c, dtype, device):
    """Random pages, and the block sums a cache would hold; sums of incomplete blocks are NaN: nobody may read them."""
    page = c.get("page") or CAPACITY
    per_row = -(-CAPACITY // page)
    k, v = torch.randn(2, 3 * per_row, page, c["hkv"], c["d"], device=device).to(dtype)
    table = torch.randperm(3 * per_row, device=device).view(3, per_row).int()
    starts = torch.tensor(c.get("starts") or [0, 0, 0], device=device)
    within = torch.arange(page, device=device).repeat(per_row)
    tokens = [row.repeat_interleave(page).long() * page + within for row in table]
    keys, values = ([x.flatten(0, 1)[tokens[i]][starts[i] :] for i in range(3)] for x in (k, v))
    blocks = -(-CAPACITY // c["block"])
    sums = torch.full((3, blocks, c["hkv"], c["d"]), math.nan, device=device)
    for i, row in enumerate(keys):
        for n in range(min(len(row), max(x for x, r in zip(LENGTHS, ROWS, strict=True) if r == i)) // c["block"]):
            sums[i, n] = row[n * c["block"] : (n + 1) * c["block"]].float().sum(0)
    return k, v, table, sums, starts.int() if c.get("starts") else None, keys, values


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    """So few blocks scored and chosen at a time that short contexts need several tiles and rounds."""
    real = configs.get
    monkeypatch.setattr(configs, "get", lambda *key: real(*key) | {"BLOCK_M": 4, "BLOCK_N": 16})
    monkeypatch.setattr(module, "ROUND", 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_decode(name, dtype, device, monkeypatch):
    c = dict(page=None, group=False, sink=0, local=0, sinks=False) | CASES[name]
    torch.manual_seed(0)
    k, v, table, sums, starts, keys, values = cache(c, dtype, device)
    monkeypatch.setattr(module, "shares", lambda *_: c["splits"])
    q = torch.randn(len(ROWS), c["hq"], c["d"], device=device).to(dtype)
    sinks = torch.randn(c["hq"], device=device) if c["sinks"] else None
    spec = Spec(c["block"], c["topk"], True, 0.3, c["group"], c["sink"], c["local"], 2 << 30)
    nslots = slots(spec, CAPACITY)
    rows, lengths = (torch.tensor(x, device=device, dtype=torch.int32) for x in (ROWS, LENGTHS))
    given = (q, k, v, table, sums, rows, lengths, starts, sinks, spec, nslots)
    out, lse, indices = module.decode(*given)
    routing = dict(block_size=c["block"], topk=c["topk"], routing="group" if c["group"] else "head")
    routing |= dict(sink_blocks=c["sink"], local_blocks=c["local"])
    for r, (row, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        if length == 0:
            assert (indices[r] == -1).all() and (out[r] == 0).all()
            assert torch.allclose(lse[r], torch.full_like(lse[r], -math.inf) if sinks is None else sinks)
            continue
        one, kr, vr = (x.double()[None] for x in (q[r : r + 1], keys[row][:length], values[row][:length]))
        chosen, _ = moba_select(one, kr, max_blocks=-(-CAPACITY // c["block"]), **routing)
        assert indices[r].equal(chosen[0, 0])
        truth = moba_attention(one, kr, vr, scale=0.3, sinks=sinks, indices=chosen, **routing)
        assert (out[r] - truth[0][0, 0]).abs().max() <= BOUND[dtype]
        assert (lse[r] - truth[1][0, 0]).abs().max() <= BOUND[dtype]
    if name in ("contiguous", "rounds"):
        assert all(x.equal(y) for x, y in zip(module.decode(*given), (out, lse, indices), strict=True))


def test_ties_and_nan_rank_as_written(device):
    """Equal scores, -0 among them, go to the lowest block; a NaN centroid ranks above +inf."""
    k = torch.zeros(1, 48, 1, 16, device=device)
    sums = torch.zeros(1, 6, 1, 16, device=device)
    sums[0, 1, 0, 0], sums[0, 2, 0, 0], sums[0, 4, 0, 0] = -0.0, 3.0, math.nan
    spec = Spec(8, 5, True, 1.0, False, 0, 0, 2 << 30)
    q = torch.ones(1, 1, 16, device=device)
    row, length = torch.tensor([[0], [48]], device=device, dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    *_, indices = module.decode(q, k, k, table, sums, row, length, None, None, spec, slots(spec, 48))
    assert indices.flatten().tolist() == [5, 4, 2, 0, 1]


def test_no_queries(device):
    k, none = torch.zeros(1, 8, 1, 16, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    spec = Spec(8, 2, True, 1.0, True, 0, 0, 2 << 30)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    sums = torch.zeros(1, 1, 1, 16, device=device)
    q = torch.zeros(0, 2, 16, device=device)
    out, lse, indices = module.decode(q, k, k, table, sums, none, none, None, None, spec, slots(spec, 8))
    assert out.shape == (0, 2, 16) and lse.shape == (0, 2) and indices.shape == (0, 1, 1)
