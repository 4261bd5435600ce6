"""`KeyConv` against its definition, `MoBADiagnostics` against plain loops and the theory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlab.moba import MoBASelection, moba_select
from attnlab.moba_tools import KeyConv, MoBADiagnostics, hit_probability
from attnlab.testing import gaussian


def conv(width: int, heads: int = 2, dim: int = 3) -> KeyConv:
    module = KeyConv(heads, dim, width)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(width)))
    return module


def keys(batch: int, tokens: int, heads: int = 2, dim: int = 3) -> Tensor:
    return torch.randn(batch, tokens, heads, dim, generator=torch.Generator().manual_seed(tokens))


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the last bit of SiLU, which PyTorch's vector and scalar loops round differently."""
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def direct(module: KeyConv, k: Tensor) -> Tensor:
    """The definition, one output at a time, in float64."""
    k, weight, out = k.double(), module.weight.double(), torch.zeros(k.shape, dtype=torch.float64)
    for t in range(k.shape[1]):
        total = sum(weight[lag] * k[:, t - lag] for lag in range(min(module.width, t + 1)))
        out[:, t] = k[:, t] + total / (1 + torch.exp(-total))
    return out


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("tokens", [0, 1, 4, 17])
def test_key_conv_is_its_definition(width, tokens):
    module, k = conv(width), keys(2, tokens)
    with torch.no_grad():
        torch.testing.assert_close(module(k).double(), direct(module, k), atol=1e-6, rtol=1e-5)
        assert module(k.half()).dtype == torch.float16
    assert torch.equal(KeyConv(2, 3, width)(k), k)


@torch.no_grad()
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.sampled_from([1, 3, 5]))
def test_key_conv_streams(cuts, width):
    module, k = conv(width), keys(2, sum(cuts))
    state, parts = None, []
    for part in k.split(cuts, 1):
        out, state = module.step(part, state)
        parts.append(out)
    close(torch.cat(parts, 1), module(k))


@torch.no_grad()
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6))
def test_key_conv_streams_ragged_rows(steps):
    module, k = conv(3), keys(2, 30)
    state, done, parts = None, [0, 0], ([], [])
    for counts in steps:
        chunk = torch.full((2, 4, 2, 3), math.nan)
        for b, n in enumerate(counts):
            chunk[b, :n] = k[b, done[b] : done[b] + n]
        out, state = module.step(chunk, state, lengths=torch.tensor(counts))
        for b, n in enumerate(counts):
            done[b] += n
            parts[b].append(out[b, :n])
    for b, total in enumerate(done):
        close(torch.cat(parts[b]), module(k[b : b + 1, :total])[0])


@torch.no_grad()
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.sampled_from([3, 5]))
def test_key_conv_never_crosses_sequences(lengths, width):
    module, k = conv(width), keys(1, sum(lengths))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    alone = torch.cat([module(part) for part in k.split(lengths, 1)], 1)
    close(module(k, cu), alone)


def test_key_conv_learns_and_refuses():
    module, k = conv(3).double(), keys(1, 5).double().requires_grad_()
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    weight = module.weight.detach().clone().requires_grad_()
    call = lambda k, w: torch.func.functional_call(module, {"weight": w}, (k, cu))
    assert torch.autograd.gradcheck(call, (k, weight))
    with pytest.raises(ValueError, match=r"KeyConv: width must be a positive int, got 0"):
        KeyConv(2, 3, 0)
    with pytest.raises(ValueError, match=r"k must have shape \[B, T, 2, 3\], got \[1, 5, 3, 2\]"):
        module(k.transpose(2, 3))
    with pytest.raises(ValueError, match="packed sequences need a batch size of 1, got 2"):
        module(k.expand(2, -1, -1, -1), cu)
    with pytest.raises(ValueError, match=r"state must have shape \[1, 2, 2, 3\], got \[1, 1, 2, 3\]"):
        module.step(k, k[:, :1])


def brute(q: Tensor, k: Tensor, selection: MoBASelection, block: int, scale: float, rules: int, sink: int, local: int):
    """Load, recall, mass and oracle of one row, query by query (`routing="head"`, causal)."""
    heads, n = q.shape[1], math.ceil(len(k) / block)
    load, choosing = torch.zeros(heads, n, dtype=torch.int64), 0
    recall, mass, oracle = (torch.zeros(heads, dtype=torch.float64) for _ in range(3))
    for i in range(len(q)):
        p = len(k) - len(q) + i
        candidates = list(range(sink, p // block - local))
        for h in range(heads):
            scores = (k[: p + 1, h // (heads // k.shape[1])].double() @ q[i, h].double()) * scale
            share = [float(x.sum()) for x in scores.softmax(0).split(block)]
            slots = selection.indices[i, h].tolist()
            picks = [b for b in slots[rules:] if b >= 0]
            load[h, picks] += 1
            count = len(slots) - rules
            best = sorted(candidates, key=lambda b: -share[b])[:count]
            if len(candidates) > count:
                recall[h] += len(set(picks) & set(best)) / count
                choosing += h == 0
            ruled = {b for b in slots[:rules] if b >= 0}
            mass[h] += sum(share[b] for b in ruled | set(picks))
            oracle[h] += sum(share[b] for b in ruled | set(best))
    return load, recall / choosing, mass / len(q), oracle / len(q), choosing


@pytest.mark.parametrize(("sink", "local", "tq"), [(0, 0, 50), (1, 0, 50), (1, 2, 50), (0, 1, 13)])
def test_diagnostics_are_the_plain_loops(sink, local, tq):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, tq, 4, 8, generator=g), torch.randn(2, 50, 2, 8, generator=g)
    options = dict(block_size=4, topk=3, sink_blocks=sink, local_blocks=local)
    selection = moba_select(q, k, **options)
    found = MoBADiagnostics.measure(q, k, scale=0.5, **options)
    for row in range(2):
        one = MoBASelection(*(x[row] for x in selection))
        load, recall, mass, oracle, choosing = brute(q[row], k[row], one, 4, 0.5, 1 + sink + local, sink, local)
        assert torch.equal(found.load[row], load) and found.queries == choosing
        for name, expected in (("recall", recall), ("mass", mass), ("oracle", oracle)):
            torch.testing.assert_close(getattr(found, name)[row], expected, atol=1e-6, rtol=1e-5)
    small = MoBADiagnostics.measure(q, k, scale=0.5, workspace_bytes=1, selection=selection, **options)
    torch.testing.assert_close(small.mass, found.mass)
    assert torch.equal(small.load, found.load) and torch.equal(small.recall, found.recall)
    lines = str(found).splitlines()
    assert len(lines) == 7 and "recall" in lines[1] and lines[-1].split()[0] == "all"


@pytest.mark.parametrize("routing", ["head", "group"])
def test_choosing_everything_covers_everything(routing):
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 20, 4, 8, generator=g), torch.randn(1, 20, 2, 8, generator=g)
    found = MoBADiagnostics.measure(q, k, block_size=4, topk=9, routing=routing)
    assert found.queries == 0 and found.recall.isnan().all()
    torch.testing.assert_close(found.mass, torch.ones_like(found.mass))
    assert found.mass.shape == (1, 4 if routing == "head" else 2)
    bidirectional = MoBADiagnostics.measure(q, k, block_size=4, topk=2, causal=False, routing=routing)
    assert (bidirectional.mass <= bidirectional.oracle).all() and (bidirectional.load.sum(-1) == 40).all()


def test_hit_probability_is_the_published_table():
    """Three needle tokens of lead 0.8 among 8192 keys, d=128, 1024 routed tokens."""
    for block, expected in ((512, 0.48), (256, 0.69), (128, 0.89), (64, 0.99)):
        snr = 2.4 * math.sqrt(128 / (2 * block))
        assert hit_probability(snr, 8192 // block, 1024 // block) == pytest.approx(expected, abs=0.007)
    assert hit_probability(0.0, 16, 4) == pytest.approx(0.25, abs=1e-6)
    assert hit_probability(9.0, 16, 1) == pytest.approx(1.0, abs=1e-6)
    assert hit_probability(-3.0, 4, 4) == 1.0 and math.isnan(hit_probability(math.nan, 4, 2))


def test_snr_finds_the_planted_signal():
    """Normal keys of variance 1/d, one of each query's keys leads by delta_mu: SNR and hits follow the closed form."""
    g = torch.Generator().manual_seed(2)
    rows, tokens, dim, block, delta = 24, 1024, 64, 32, 2.0
    k = torch.randn(rows, tokens, 1, dim, generator=g) / math.sqrt(dim)
    q = torch.randn(rows, 8, 1, dim, generator=g)
    q = q / q.norm(dim=-1, keepdim=True)
    needles = torch.randint(0, tokens // 2, (rows, 8), generator=g)
    needles[:, 0] = -1
    for row in range(rows):
        for i in range(1, 8):
            k[row, needles[row, i]] += delta * q[row, i]
    found = MoBADiagnostics.measure(q, k, block_size=block, topk=5, needles=needles)
    snr = float(found.snr.mean())
    assert snr == pytest.approx(delta * math.sqrt(dim / (2 * block)), rel=0.15)
    assert float(found.hits.mean()) == pytest.approx(hit_probability(snr, tokens // block - 1, 4), abs=0.1)
    assert float(found.expected_hits.mean()) == pytest.approx(hit_probability(snr, tokens // block - 1, 4), abs=0.1)
    assert "snr" in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"needles": [[0, 1, 0, 1]]}, "needles must be a Tensor of ints, got list"),
        ({"needles": torch.zeros(1, 4)}, "needles must be a Tensor of ints, got torch.float32"),
        ({"topk": 0}, "topk must be a positive int, got 0"),
        ({"workspace_bytes": 0}, "workspace_bytes must be a positive int, got 0"),
        ({"needles": torch.zeros(1, 3).int()}, r"needles must have shape \[1, 4\], got \[1, 3\]"),
        ({"q": torch.zeros(1, 0, 2, 4)}, "needs queries and keys, got Tq=0, Tk=4"),
    ],
)
def test_bad_diagnostics(change, message):
    arguments = {"q": torch.zeros(1, 4, 2, 4), "k": torch.zeros(1, 4, 2, 4), "block_size": 2, "topk": 1} | change
    with pytest.raises((ValueError, TypeError), match=message):
        MoBADiagnostics.measure(**arguments)


def test_autocast_changes_no_diagnostics():
    q, k, _ = gaussian(1, 40, 40, 4, 2, 16)
    want = MoBADiagnostics.measure(q, k, block_size=8, topk=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = MoBADiagnostics.measure(q, k, block_size=8, topk=2)
    assert torch.equal(found.mass, want.mass) and torch.equal(found.recall, want.recall)
