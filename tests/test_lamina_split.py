"""Any partition of a cache into any number of shards, some of them empty, equals one call over all of it."""

import functools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import BackendError, explain
from attnlab.lamina import Shard, SplitPlan, split, split_attention, split_decode
from attnlab.testing import assert_accurate, gaussian, plain_attention

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["reference", "portable", "cpu"]
ALL = [*BACKENDS, "triton"]  # the interpreter is too slow for hundreds of calls
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def expected(x, lengths, dtype):
    """Out and lse of masked attention in `dtype`; keys past the lengths are nobody's."""
    seen = torch.arange(x.k.shape[1]) < lengths[:, None]
    k, v = (t.masked_fill(~seen[..., None, None], 0.0) for t in (x.k, x.v))
    if not k.shape[1]:
        return torch.zeros_like(x.q, dtype=dtype), torch.full(x.q.shape[:3], -torch.inf).to(dtype)
    return plain_attention(x.q.to(dtype), k.to(dtype), v.to(dtype), seen[:, None, None])


def check(x, lengths, shards, plan, backend):
    out, lse = split_attention(x.q, shards, plan, backend=backend)
    assert out.dtype == x.q.dtype and lse.dtype == torch.float32
    truth, plain = expected(x, lengths, torch.float64), expected(x, lengths, x.q.dtype)
    # A merge has roundings of its own, and the error of `plain` over a few keys may be small by luck.
    assert_accurate(out, truth[0], plain[0], roundings=2, what="out")
    assert_accurate(lse, truth[1], plain[1], roundings=2, what="lse")


@st.composite
def problems(draw, by):
    """q, k, v, lengths or None, and a plan of 1 to 9 shards that fits them."""
    group, kv_heads, batch = draw(st.sampled_from([1, 2, 8])), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    tokens, queries, dim = draw(st.integers(0, 150)), draw(st.integers(1, 3)), draw(st.sampled_from([5, 16]))
    dtype = draw(st.sampled_from(DTYPES))
    sizes = (batch, queries, tokens, group * kv_heads, kv_heads, dim)
    x = gaussian(*sizes, dtype=dtype, seed=draw(st.integers(0, 9)), scale=1.5)
    lengths = draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    n = draw(st.integers(1, 9))
    if by == "head":
        owners = Counter(draw(st.lists(st.integers(0, n - 1), min_size=kv_heads, max_size=kv_heads)))
        shares = tuple(owners[i] for i in range(n))
    else:
        shares = tuple(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n).filter(any)))
    even = draw(st.booleans()) and (by != "head" or n <= kv_heads)
    plan = SplitPlan(by, n, None if even else shares, draw(st.integers(1, 70)))
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32)
        for b, length in enumerate(lengths.tolist()):
            x.k[b, length:], x.v[b, length:] = torch.nan, torch.nan
    return x, lengths, plan


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["head", "request", "sequence"])
def test_any_partition_equals_one_call(by, backend):
    @settings(max_examples=30)
    @given(problems(by))
    def run(problem):
        x, lengths, plan = problem
        held = torch.full(x.q.shape[:1], x.k.shape[1]) if lengths is None else lengths
        check(x, held, plan.split(x.k, x.v, lengths), plan, backend)

    run()


@functools.cache
def whole(dtype=torch.float32):
    x = gaussian(3, 2, 70, 4, 2, 8, dtype=dtype, seed=3)
    return x, torch.tensor([70, 0, 33], dtype=torch.int32)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("by", ["head", "request", "sequence"])
def test_paged_shards(by, backend):
    """Each shard has pages of its own size, and a page nobody has is never read."""
    x, lengths = whole()
    plan, shards = SplitPlan(by, 2, block=5), []
    for i, shard in enumerate(plan.split(x.k, x.v, lengths)):
        size, batch = 4 + 3 * i, len(shard.lengths)
        wide = -(-shard.k.shape[1] // size)
        table = torch.arange(batch * wide).flip(0).view(batch, wide).int()
        pages = []
        for t in (shard.k, shard.v):
            room = torch.full((batch * wide + 1, size, *t.shape[2:]), torch.nan)
            padded = torch.nn.functional.pad(t, (0, 0, 0, 0, 0, wide * size - t.shape[1]))
            room[table.long()] = padded.unflatten(1, (wide, size))
            pages.append(room)
        shards.append(Shard(*pages, shard.lengths, table))
    check(x, lengths, shards, plan, backend)


@pytest.mark.parametrize("backend", ALL)
def test_shards_without_anything(backend):
    """0 heads, 0 rows and 0 tokens, paged or not, in front, between and behind."""
    x, lengths = whole()
    none = x.k[:, :, :0]
    head = [(none, none), Shard(x.k, x.v, lengths), (none, none, lengths)]
    check(x, lengths, head, SplitPlan("head", 3, (0, 2, 0)), backend)
    none, table = x.k[:0], torch.zeros(0, 4, dtype=torch.int32)
    request = [(none, none), (x.k, x.v, lengths), (none, none, lengths[:0]), (x.k, x.v, lengths[:0], table)]
    check(x, lengths, request, SplitPlan("request", 4), backend)
    none, table = x.k[:, :0], torch.zeros(3, 0, dtype=torch.int32)
    sequence = [(none, none), (x.k, x.v, lengths), (x.k, x.v, 0 * lengths), (x.k, x.v, 0 * lengths, table)]
    check(x, lengths, sequence, SplitPlan("sequence", 4), backend)


@pytest.mark.parametrize("backend", ALL)
def test_no_keys_and_no_rows(backend):
    x, _ = whole()
    none = x.k[:, :0]
    for shards in ([(none, none)] * 3, [(x.k, x.v, torch.zeros(3, dtype=torch.int32))] * 3):
        out, lse = split_attention(x.q, shards, SplitPlan("sequence", 3), backend=backend)
        assert torch.equal(out, torch.zeros_like(x.q)) and (lse == -torch.inf).all() and lse.shape == (3, 2, 4)
    for by in ("head", "request", "sequence"):
        plan = SplitPlan(by, 2)
        out, lse = split_attention(x.q[:0], plan.split(x.k[:0], x.v[:0]), plan, backend=backend)
        assert out.shape == (0, 2, 4, 8) and lse.shape == (0, 2, 4)


def test_partial_states_are_kept_exact():
    """Of half precision only the answer is rounded: nine shards err as one rounding does."""
    x = gaussian(2, 1, 900, 4, 2, 64, dtype=torch.bfloat16)
    plan = SplitPlan("sequence", 9, block=3)
    truth = split_decode(*(t.double() for t in x), backend="reference")[0]
    out = split_attention(*x[:1], plan.split(*x[1:]), plan, backend="portable")[0]
    error, rounding = ((y.double() - truth).square().mean() for y in (out, truth.to(out.dtype)))
    assert error <= 1.05 * rounding


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_states_are_merged_where_they_were_made(backend, monkeypatch):
    """The C kernels merge as they go; others ask for it by name."""
    x, lengths = whole()
    plan, said, real = SplitPlan("sequence", 2), [], split.merge_states
    monkeypatch.setattr(split, "merge_states", lambda *a, **b: said.append(b["backend"]) or real(*a, **b))
    split_attention(x.q, plan.split(x.k, x.v, lengths), plan, backend=backend)
    assert said == [backend]


def test_float64_stays_float64():
    x, lengths = whole(torch.float64)
    plan = SplitPlan("sequence", 3, block=4)
    out, lse = split_attention(x.q, plan.split(x.k, x.v, lengths), plan, scale=0.3)
    want = split_decode(*x, lengths=lengths, scale=0.3, backend="reference")
    torch.testing.assert_close((out, lse), want, rtol=1e-12, atol=1e-12)


def test_backends():
    x, lengths = whole()
    plan = SplitPlan("head", 2)
    shards = plan.split(x.k, x.v, lengths)
    assert explain(split_attention, x.q, shards, plan, backend="portable").chosen == "portable"
    with pytest.raises(ValueError, match="backend must be one of"):
        split_attention(x.q, shards, plan, backend="flash")
    with pytest.raises(BackendError, match="float64"):
        shards = [(k.double(), v.double()) for k, v, *_ in shards]
        split_attention(x.q.double(), shards, plan, backend="cpu")


X = gaussian(2, 1, 9, 4, 2, 8)
KV, HALF = (X.k, X.v), (X.k[:, :, :1], X.v[:, :, :1])
NONE = (X.k[:, :0], X.v[:, :0])
HEAD, REQUEST, SEQUENCE = (SplitPlan(by, 2) for by in ("head", "request", "sequence"))
LENGTHS = torch.tensor([9, 10], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: split_attention(X.q, [KV], 2), TypeError, "plan must be a SplitPlan, got int"),
        (lambda: split_attention(None, [KV, KV], SEQUENCE), TypeError, "q must be a Tensor, got NoneType"),
        (lambda: split_attention(X.q[0], [KV, KV], SEQUENCE), ValueError, r"q must have shape \[B, T, H, D\]"),
        (lambda: split_attention(X.q, X.k, SEQUENCE), TypeError, "kv_shards must be a sequence of shards, got Tensor"),
        (lambda: split_attention(X.q, [KV], SEQUENCE), ValueError, "kv_shards must be the plan's 2 shards, got 1"),
        (lambda: split_attention(X.q, [KV, X.k], SEQUENCE), TypeError, r"kv_shards\[1\] must be a Shard or .* Tensor"),
        (lambda: split_attention(X.q, [KV, (X.k,)], SEQUENCE), TypeError, r"kv_shards\[1\] must be .* got 1 items"),
        (lambda: split_attention(X.q, [KV, (X.k, 3)], SEQUENCE), TypeError, r"kv_shards\[1\].v must be a Tensor"),
        (
            lambda: split_attention(X.q, [KV, (X.k, X.v[:1])], SEQUENCE),
            ValueError,
            r"kv_shards\[1\] must hold k and v of one shape \[B, T, Hkv, 8\], got \[2, 9, 2, 8\] and \[1, 9, 2, 8\]",
        ),
        (lambda: split_attention(X.q[..., :4], [KV, KV], SEQUENCE), ValueError, r"one shape \[B, T, Hkv, 4\]"),
        (
            lambda: split_attention(X.q, [KV, (X.k[:, :0].half(), X.v[:, :0].half())], SEQUENCE),
            TypeError,
            r"kv_shards\[1\].k must have q's dtype torch.float32, got torch.float16",
        ),
        (lambda: split_attention(X.q, [KV, (*NONE, LENGTHS)], SEQUENCE), ValueError, r"lengths must be in 0..0 "),
        (lambda: split_attention(X.q, [KV, HALF], SEQUENCE), ValueError, r"must have the same KV heads, got \[2, 1\]"),
        (
            lambda: split_attention(X.q[:1], [KV, KV], SEQUENCE),
            ValueError,
            r"kv_shards\[0\] must have q's batch size 1, got 2",
        ),
        (lambda: split_attention(X.q, [KV, KV], REQUEST), ValueError, r"must hold q's 2 rows in all, got \[2, 2\]"),
        (
            lambda: split_attention(X.q, [KV, HALF], HEAD),
            ValueError,
            "q's heads must be a multiple of the 3 KV heads of kv_shards, got 4",
        ),
        (
            lambda: split_attention(X.q, [KV, (X.k[:, :, :0],) * 2], HEAD),
            ValueError,
            r"kv_shards must hold \[1, 1\] KV heads, as the plan says, got \[2, 0\]",
        ),
        (
            lambda: split_attention(X.q, [HALF, HALF], SplitPlan("head", 2, (2, 0))),
            ValueError,
            r"kv_shards must hold \[2, 0\] KV heads, as the plan says, got \[1, 1\]",
        ),
        (
            lambda: split_attention(X.q, [HALF] * 2 + [(X.k[:, :, :0],) * 2], SplitPlan("head", 3)),
            ValueError,
            "shards must be at most the 2 KV heads, got 3",
        ),
        (lambda: split_attention(X.q, [KV, KV], SEQUENCE, scale="1"), TypeError, "scale must be a number or None"),
        (lambda: split_attention(X.q, [(*KV, LENGTHS), KV], SEQUENCE), ValueError, r"lengths must be in 0..9 "),
        (lambda: split_attention(X.q, [(*KV, None, LENGTHS), KV], SEQUENCE), ValueError, r"page_table must have shape"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
