"""`split_decode` and `shared_prefix_decode` of every backend against a masked softmax in float64.

Without a GPU Triton interprets, where bfloat16 is wrong: float16 and float32 there.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnlab
from attnlab import merge_states, shared_prefix_decode, split_decode
from attnlab.kernels import configs
from attnlab.kernels.lamina import decode as triton_kernel
from attnlab.kernels.lamina import portable
from attnlab.lamina import decode
from attnlab.testing import assert_accurate, gaussian
from tests.lamina_problems import CASES, Case, Problem

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = list(decode.BACKENDS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HALF = ("ragged, 3 queries", "D=96", "pages of 5", "pages of 64", "large scale", "prefix", "prefix, pages")


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """Tiles, shares and pieces so small that few keys fill several."""
    if "production" not in request.fixturenames:
        real = configs.get
        tile = {"BLOCK_N": 16}
        monkeypatch.setattr(configs, "get", lambda name, *key: real(name, *key) | (tile if "lamina" in name else {}))
        monkeypatch.setattr(triton_kernel, "LEAST", 32)
        monkeypatch.setattr(portable, "SHARE", 24)
        monkeypatch.setattr(portable, "PIECE", 1000)
        monkeypatch.setattr(portable, "LARGE_PAGE", 64)


@pytest.fixture
def production():
    """Keeps tiles, shares and pieces as they are."""


def on(backend, device):
    """Where a backend's tensors lie in these tests."""
    return torch.device("cpu") if backend == "cpu" else device


def call(p, backend, **options):
    fn = split_decode if p.case.prefix is None else shared_prefix_decode
    return fn(*p.tensors, backend=backend, **p.options, **options)


def served():
    """Backends, names of cases and dtypes, of which the interpreter, which is slow, takes a part."""
    found = []
    for backend in BACKENDS:
        for name in CASES:
            dtypes = DTYPES[:3]
            if backend in ("reference", "portable"):
                dtypes = DTYPES if backend == "portable" else DTYPES[::3]
            elif backend == "triton" and not torch.cuda.is_available():
                dtypes = DTYPES[: 1 + (name in HALF)]
            found += [(backend, name, dtype) for dtype in dtypes]
    return found


@pytest.mark.parametrize(("backend", "name", "dtype"), served(), ids=str)
def test_accuracy(backend, name, dtype, device):
    p = Problem(CASES[name], dtype, on(backend, device))
    # The truth is float64: its scores, of up to about 8, are as rounded as those under test.
    p.check(call(p, backend), 16 if dtype == torch.float64 else 2)


@pytest.mark.parametrize("name", ["ragged", "pages of 5", "prefix"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_any_number_of_splits(backend, name, device):
    p = Problem(CASES[name], torch.float32, on(backend, device))
    few = (1, 2, 9) if name == "ragged" else (3,)  # for the interpreter
    for splits in few if backend == "triton" else range(1, 10):
        p.check(call(p, backend, splits=splits))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_prefix_is_the_concatenation(backend, device):
    c = CASES["prefix"]
    p = Problem(c, torch.float32, on(backend, device))
    q, k_prefix, v_prefix, k, v = p.tensors
    k, v = (torch.cat([x.expand(len(q), -1, -1, -1), y], 1) for x, y in ((k_prefix, k), (v_prefix, v)))
    whole = split_decode(q, k, v, lengths=p.options["lengths"] + c.prefix, backend=backend)
    for a, b in zip(call(p, backend), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_shards_merge_into_the_whole(backend, device):
    """Cut anywhere, some of it empty, and kept in float32 between."""
    where = on(backend, device)
    q, k, v = (x.to(where) for x in gaussian(2, 1, 50, 4, 2, 16, dtype=torch.float16))
    parts = [split_decode(q, k[:, a:b], v[:, a:b], out_dtype=torch.float32, backend=backend)
             for a, b in ((0, 0), (0, 17), (17, 18), (18, 18), (18, 50))]  # fmt: skip
    assert all(out.dtype == torch.float32 for out, _ in parts)
    out, lse = merge_states(*(torch.stack(x) for x in zip(*parts, strict=True)), backend="reference")
    p = Problem(Case([1]), torch.float16)
    p.tensors, p.prefix, p.case = [q, k, v], (k.cpu()[0, :0],) * 2, Case([50, 50])
    p.own = list(zip(k.cpu(), v.cpu(), strict=True))
    p.check((out.half(), lse))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ragged", "prefix, pages"])
def test_portable_states_are_exact_in_float32(name, dtype):
    p = Problem(CASES[name], dtype)
    out, _ = call(p, "portable", out_dtype=torch.float32)
    assert_accurate(out, p.expected()[0], p.expected(torch.float32)[0], roundings=2)
    assert torch.equal(out.to(dtype), call(p, "portable")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scores_do_not_overflow(backend, dtype, device):
    """The key of the highest score takes all, whichever share it lies in, and one of -inf's size takes nothing."""
    where = on(backend, device)
    q, k, v = (x.to(where) for x in gaussian(1, 1, 80, 2, 1, 16, dtype=dtype))
    q[:], k[:, 5], k[:, 61], k[:, 70] = 200.0, 200.0, 250.0, -250.0
    for sign in (1, -1):
        out, lse = split_decode(q, sign * k, v, scale=float(sign), backend=backend)
        torch.testing.assert_close(out[0, 0], v[0, 61].expand(2, -1))
        torch.testing.assert_close(lse, torch.full_like(lse, 200.0 * 250.0 * 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gaps_between_elements(backend, device):
    """In the last dimensions; what lies there is nobody's."""
    p = Problem(Case([9, 0, 18], hq=4, hkv=2, page=5), torch.float32, on(backend, device))
    p.tensors = [torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0] for x in p.tensors]
    lengths, table = p.options["lengths"], p.options["page_table"]
    p.options["lengths"] = torch.stack([lengths, lengths - 1], -1)[..., 0]
    p.options["page_table"] = torch.stack([table, table.clamp(min=0).flip(0)], -1)[..., 0]
    p.check(call(p, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_queries(backend, device):
    where = on(backend, device)
    for batch, tq in ((0, 1), (0, 0), (2, 0)):
        q, k = torch.ones(batch, tq, 4, 16, device=where), torch.ones(batch, 9, 2, 16, device=where)
        prefix = k.new_ones(3, 2, 16)
        for out, lse in (
            split_decode(q, k, k, backend=backend),
            split_decode(q, k, k, lengths=torch.full((batch,), 4, dtype=torch.int32, device=where), backend=backend),
            shared_prefix_decode(q, prefix, prefix, k, k, backend=backend),
        ):
            assert out.shape == q.shape and lse.shape == q.shape[:3]


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 8]),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from([None, 1, 3, 7, 64]),
    st.sampled_from([None, 0, 1, 30]),
    st.sampled_from([None, 1, 2, 5]),
)
def test_shapes(lengths, tq, group, hkv, d, page, prefix, splits):
    case = Case(lengths, tq, group * hkv, hkv, d, page, prefix, room=61)
    p = Problem(case, torch.float32)
    for backend in ("portable", "cpu", "reference"):
        p.check(call(p, backend, splits=splits))


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_opcheck(backend, device):
    device = on(backend, device)
    p = Problem(Case([3, 0], hq=4, hkv=2, room=5), torch.float32, device)
    tail = (0.3, None, torch.float32, backend)
    op = torch.ops.attnlab.split_decode.default
    torch.library.opcheck(op, (*p.tensors, p.options["lengths"], None, *tail))
    p = Problem(Case([3, 0], page=2, prefix=3), torch.float32, device)
    op = torch.ops.attnlab.shared_prefix_decode.default
    torch.library.opcheck(op, (*p.tensors, p.options["lengths"], p.options["page_table"], *tail))


def test_compiles_whole_with_dynamic_lengths():
    def fn(q, k, v, lengths):
        return split_decode(q, k, v, lengths=lengths, out_dtype=torch.float32, backend="portable")

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, t in ((2, 30), (3, 41), (4, 64)):
        x = gaussian(batch, 1, t, 4, 2, 8)
        lengths = torch.arange(batch, dtype=torch.int32) * 7
        assert all(torch.equal(a, b) for a, b in zip(compiled(*x, lengths), fn(*x, lengths), strict=True))
    with pytest.raises(ValueError, match=r"lengths must be in 0..64"):
        compiled(*x, lengths + 60)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend, device):
    p = Problem(CASES["prefix"], torch.float32, on(backend, device))
    want = call(p, backend)
    with torch.autocast(want[0].device.type, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(call(p, backend), want, strict=True))


def test_explain():
    for name in ("ragged", "prefix"):
        p = Problem(CASES[name], torch.float32)
        fn = split_decode if p.case.prefix is None else shared_prefix_decode
        said = attnlab.explain(fn, *p.tensors, **p.options)
        assert said.chosen in ("cpu", "portable") and set(said.reasons) == set(BACKENDS)
        with pytest.raises(attnlab.BackendError, match="float64"):
            fn(*(x.double() for x in p.tensors), backend="triton", **p.options)


def test_values_are_checked_once_per_tensor(monkeypatch):
    reads = []
    real = decode.check_pages
    monkeypatch.setattr(decode, "check_pages", lambda *x: reads.append(1) or real(*x))
    p = Problem(CASES["pages of 5"], torch.float32)
    for _ in range(3):
        call(p, "portable")
    assert len(reads) == 1
    p.options["lengths"].sub_(0)
    call(p, "portable")
    p.options["page_table"].mul_(1)
    call(p, "portable")
    assert len(reads) == 3


def test_portable_copies_no_keys(monkeypatch, production):
    """A float32 cache reaches PyTorch's kernel as views of itself, in one call for all rows or all shares of a row."""
    seen, real = [], portable.flash
    monkeypatch.setattr(portable, "flash", lambda *x: seen.append(x) or real(*x))
    for batch, heads_first in ((1, False), (1, True), (3, False)):
        q, k, v = gaussian(batch, 2, 4096, 4, 2, 8)
        if heads_first:
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        split_decode(q, k, v, backend="portable")
        storages = {x.untyped_storage().data_ptr() for x in (k, v)}
        assert {x.untyped_storage().data_ptr() for call in seen for x in call[1:3]} == storages
        assert len(seen) == (1 if batch == 1 else 2) and math.prod(seen[0][0].shape) == q.numel() * (3 - len(seen))
        seen.clear()
