"""How split decoding runs on Triton: launches that follow from shapes, shares left empty, graphs, far keys."""

import math

import pytest
import torch
from torch import Tensor

from attnlab import shared_prefix_decode, split_decode
from attnlab.kernels import configs
from attnlab.kernels.lamina import decode as module
from attnlab.kernels.lamina import launch
from attnlab.kernels.lamina.spec import Cache
from tests.lamina_problems import CASES, Case, Problem

F32 = torch.float32


class Recorder:
    """Stands for a kernel: notes its launches instead of running."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, dict]] = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid[0], kwargs))


def empty_cache(rows, room, kv_heads, d, page):
    if page is None:
        k, table = torch.zeros(d, dtype=torch.float16).expand(rows, room, kv_heads, d), None
    else:
        k = torch.zeros(1, page, kv_heads, d, dtype=torch.float16)
        table = torch.zeros(rows, room // page, dtype=torch.int32)
    return Cache(k, k, table, torch.zeros(rows, dtype=torch.int32))


LAUNCHES = {
    # rows, queries, keys a row has room for, query and KV heads, page: programs of a share, shares, BLOCK_M, layout
    "one long row": ((1, 1, 131072, 8, 1, None), 1, 8, 16, "rows"),
    "heads fill the device": ((1, 1, 131072, 32, 8, 64), 8, 1, 16, "pages"),
    "little to share": ((1, 1, 700, 4, 1, 1), 1, 3, 16, "slots"),
    "batch": ((3, 1, 4096, 4, 1, 16), 3, 2, 16, "slots"),
    "three queries": ((1, 3, 4096, 8, 1, None), 1, 8, 32, "rows"),
    "many queries": ((1, 40, 4096, 8, 1, 128), 3, 2, 128, "pages"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_shapes_decide_the_launch(name, monkeypatch):
    """On the interpreter's four processors, and nothing is read on the host."""
    (rows, tokens, room, hq, hkv, page), programs, splits, block_m, layout = LAUNCHES[name]
    kernel, merges = Recorder(), []
    monkeypatch.setattr(module, "decode_kernel", kernel)
    monkeypatch.setattr(module, "merge", lambda *x: merges.append((len(x[0]), x[0].dtype)))
    cache, q = empty_cache(rows, room, hkv, 128, page), torch.zeros(rows, tokens, hq, 128, dtype=torch.float16)
    with monkeypatch.context() as patch:
        for read in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__", "__iter__"):
            patch.setattr(Tensor, read, None)
        out, lse = launch.decode(q, cache, 0.1, None, F32)
        launch.decode(q, cache, 0.1, 5, torch.float16)
        launch.decode(q, cache, 0.1, 10**6, torch.float16)
    assert out.shape == q.shape and out.dtype == F32 and lse.shape == q.shape[:3]
    (grid, constants), (forced, _), (most, _) = kernel.launches
    tiles_of_keys = -(-room // constants["BLOCK_N"])  # a share each
    assert (grid, forced, most) == (programs * splits, programs * 5, programs * tiles_of_keys)
    assert (constants["BLOCK_M"], constants["LAYOUT"]) == (block_m, layout)
    assert merges == [*[(splits, F32)] * (splits > 1), (5, F32), (tiles_of_keys, F32)]


def test_a_prefix_is_one_more_launch_and_one_merge(monkeypatch):
    """Its rows are all rows; what has no room for keys is not launched."""
    kernel, merges = Recorder(), []
    monkeypatch.setattr(module, "decode_kernel", kernel)
    monkeypatch.setattr(module, "merge", lambda *x: merges.append(len(x[0])))
    q = torch.zeros(6, 2, 16, 64, dtype=torch.float16)
    for room, prefix in ((512, 2048), (512, 0), (0, 2048), (0, 0)):
        k = torch.zeros(prefix, 2, 64, dtype=torch.float16)
        launch.prefix_decode(q, k, k, empty_cache(6, room, 2, 64, None), 0.1, None, torch.float16)
    tails, shared = 6 * 2, 2 * 4  # KV heads of each row, one share; 96 rows of both KV heads, 4 shares of the prefix
    assert [grid for grid, _ in kernel.launches] == [tails, shared, tails, shared]
    assert [x["BLOCK_M"] for _, x in kernel.launches] == [16, 128, 16, 128]
    assert merges == [1 + 4, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts calls of the interpreter")
@pytest.mark.parametrize(("coarse", "steps"), [(True, [6, 6, 6, 3, 3, 2]), (False, [6, 6, 6, 3, 2, 2, 1])])
def test_short_rows_leave_their_shares_empty(coarse, steps, monkeypatch):
    """A row's own length is what its shares cut, none shorter than LEAST if nobody asked for so many."""
    real_config, real_step, real_load = configs.get, module.softmax_step, module.tile_rows
    work = []
    monkeypatch.setattr(configs, "get", lambda name, *key: real_config(name, *key) | {"BLOCK_N": 16})
    monkeypatch.setattr(module, "LEAST", 48)
    monkeypatch.setattr(module, "shares", lambda *_: 4)
    monkeypatch.setattr(module, "tile_rows", lambda *x: work.append(0) or real_load(*x))
    monkeypatch.setattr(module, "softmax_step", lambda *x: work.__setitem__(-1, work[-1] + 1) or real_step(*x))
    p = Problem(Case([330, 70, 0], room=400), torch.float32)
    p.check(split_decode(*p.tensors, **p.options, splits=None if coarse else 4, backend="triton"))
    assert len(work) == 12 and [n for n in work if n] == steps


@pytest.mark.parametrize("name", ["ragged, 3 queries", "prefix, pages"])
def test_results_repeat_bit_for_bit(name, device):
    p = Problem(CASES[name], torch.float16, device)
    fn = split_decode if p.case.prefix is None else shared_prefix_decode
    first = fn(*p.tensors, **p.options, splits=3, backend="triton")
    again = fn(*p.tensors, **p.options, splits=3, backend="triton")
    assert all(map(torch.equal, first, again))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged", "pages of 5", "pages of 64", "prefix", "prefix, pages"])
def test_graph_reads_lengths_and_pages_anew(name, device):
    p = Problem(CASES[name], torch.float16, device)
    fn = split_decode if p.case.prefix is None else shared_prefix_decode
    run = lambda: fn(*p.tensors, **p.options, backend="triton")
    run()  # compiled before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for shrink in (1, 2):
        p.options["lengths"].div_(shrink, rounding_mode="floor")
        p.tensors[0].mul_(shrink)
        graph.replay()
        for a, b in zip(got, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [None, 1, 64])
def test_more_than_2_to_the_31_elements(page, device):
    """The last keys of the last row lie past what 32 bits can count."""
    rows, room, d = 3, 1 << 19, 2048
    k = torch.zeros(rows, room, 16, d // 16, dtype=torch.float16, device=device)
    assert k.numel() > 1 << 31
    g = torch.Generator(device).manual_seed(0)
    k[-1, -100:].normal_(generator=g)
    q = torch.randn(rows, 1, 16, d // 16, dtype=torch.float16, device=device, generator=g)
    lengths = torch.tensor([1, 0, room], dtype=torch.int32, device=device)
    options, cache = {"lengths": lengths}, k
    if page is not None:
        cache = k.view(-1, page, *k.shape[2:])
        options["page_table"] = torch.arange(len(cache), dtype=torch.int32, device=device).view(rows, -1)
    out, lse = split_decode(q, cache, cache, **options, backend="triton")
    tail = k[-1:, -100:].double()
    scores = torch.einsum("bihd,bjhd->bihj", q[-1:].double(), tail) * (d // 16) ** -0.5
    total = torch.cat([scores, scores.new_zeros(1, 1, 16, 1) + math.log(room - 100)], -1).logsumexp(-1)
    want = torch.einsum("bihj,bjhd->bihd", (scores - total[..., None]).exp(), tail)
    torch.testing.assert_close(lse[-1:].double(), total, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out[-1:].double(), want, rtol=1e-2, atol=1e-4)
    assert lse[1].isneginf().all() and out[1].eq(0).all()
