"""The reference against two computations that share no code with it: per-query loops, and eager FlexAttention."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from attnlab.reference import moba, states
from attnlab.testing import clustered, gaussian, ragged, selection_mask, tied

CASES = [
    # tq, tk, heads, kv_heads, block_size, options
    (23, 23, 2, 2, 4, dict(topk=1)),
    (23, 23, 2, 2, 4, dict(topk=3)),
    (23, 23, 2, 2, 4, dict(topk=99)),
    (23, 23, 4, 2, 4, dict(topk=3, routing="group")),
    (23, 23, 4, 2, 5, dict(topk=2, sink_blocks=1, local_blocks=1)),
    (23, 23, 4, 2, 5, dict(topk=2, sink_blocks=9, local_blocks=9)),
    (9, 23, 3, 1, 4, dict(topk=3)),
    (9, 23, 2, 2, 4, dict(topk=3, causal=False)),
    (23, 9, 2, 1, 4, dict(topk=2, causal=False, sink_blocks=1)),
    (17, 17, 2, 2, 1, dict(topk=5)),
    (3, 3, 2, 2, 8, dict(topk=2)),
    (1, 1, 2, 2, 8, dict(topk=2)),
]


def loops(q, k, v, *, block_size, topk, causal=True, routing="head", sink_blocks=0, local_blocks=0, sinks=None):
    """MoBA one query and head at a time."""
    tq, heads, d = q.shape
    tk, group = k.shape[0], heads // k.shape[1]
    n = math.ceil(tk / block_size)
    out, lse, chosen = torch.zeros_like(q), torch.zeros(tq, heads, dtype=q.dtype), {}
    for i in range(tq):
        position = tk - tq + i
        own = position // block_size
        for h in range(heads):
            g = h // group
            voters = range(g * group, (g + 1) * group) if routing == "group" else [h]
            scores = {}
            for j in range(n):
                block = k[j * block_size : (j + 1) * block_size, g]
                scores[j] = sum(float(q[i, voter] @ (block.sum(0) / len(block))) for voter in voters)
            always = {j for j in range(min(sink_blocks, n)) if not causal or j < own}
            if causal:
                always |= {own} | {own - x for x in range(1, local_blocks + 1) if own - x >= 0}
            free = [j for j in range(n) if j not in always and (not causal or j < own)]
            best = sorted(free, key=lambda j: (-scores[j], j))[: topk - 1 if causal else topk]
            blocks = always | set(best)
            chosen[i, h] = blocks
            keys = [t for t in range(tk) if t // block_size in blocks and (not causal or t <= position)]
            s = torch.stack([q[i, h] @ k[t, g] for t in keys]) / math.sqrt(d)
            total = s.exp().sum() + (0 if sinks is None else sinks[h].exp())
            out[i, h] = sum(w * v[t, g] for w, t in zip(s.exp() / total, keys, strict=True))
            lse[i, h] = total.log()
    return out, lse, chosen


@pytest.mark.parametrize("tq, tk, heads, kv_heads, block_size, options", CASES)
@pytest.mark.parametrize("make", [lambda x, _: x, tied])
def test_equals_loops(tq, tk, heads, kv_heads, block_size, options, make):
    q, k, v = make(gaussian(1, tq, tk, heads, kv_heads, 8, dtype=torch.float64), block_size)
    sinks = torch.linspace(-1, 2, heads, dtype=torch.float64)
    out, lse = moba.moba_attention(q, k, v, block_size=block_size, sinks=sinks, **options)
    want_out, want_lse, chosen = loops(q[0], k[0], v[0], block_size=block_size, sinks=sinks, **options)
    torch.testing.assert_close(out[0], want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse[0], want_lse, rtol=1e-12, atol=1e-12)
    indices, scores = moba.moba_select(q, k, block_size=block_size, **options)
    group = heads // indices.shape[2]
    for (i, h), blocks in chosen.items():
        row = indices[0, i, h // group].tolist()
        assert {j for j in row if j >= 0} == blocks and len(blocks) == sum(j >= 0 for j in row)
    assert torch.equal(indices < 0, scores == -math.inf)


@pytest.mark.parametrize("causal", [True, False])
def test_equals_flex_attention(causal):
    block_size = 16
    q, k, v = clustered(gaussian(2, 64, 64, 4, 2, 16, dtype=torch.float64), block_size)
    options = dict(block_size=block_size, topk=2, causal=causal)
    indices, _ = moba.moba_select(q, k, **options)
    mask = selection_mask(indices, 4, 64, block_size, causal)
    bhtd = (x.transpose(1, 2) for x in (q, k, v))

    def score_mod(score, b, h, i, j):
        return torch.where(mask[b, h, i, j], score, -math.inf)

    want, aux = flex_attention(*bhtd, score_mod=score_mod, enable_gqa=True, return_aux=AuxRequest(lse=True))
    out, lse = moba.moba_attention(q, k, v, **options)
    torch.testing.assert_close(out, want.transpose(1, 2))
    torch.testing.assert_close(lse, aux.lse.transpose(1, 2), check_dtype=False, atol=1e-5, rtol=1e-5)


def test_all_blocks_is_full_attention_and_one_block_is_not():
    q, k, v = gaussian(1, 30, 30, 2, 1, 8, dtype=torch.float64)
    full = states.full_attention(q, k, v)
    for topk in (8, 9, 100):
        torch.testing.assert_close(moba.moba_attention(q, k, v, block_size=4, topk=topk), full)
    alone = moba.moba_attention(q, k, v, block_size=4, topk=1)[0]
    for start in range(0, 30, 4):
        part = slice(start, start + 4)
        torch.testing.assert_close(alone[:, part], states.full_attention(q[:, part], k[:, part], v[:, part])[0])


def test_ties_go_to_the_lowest_block():
    q, k, v = tied(gaussian(1, 40, 40, 1, 1, 8, dtype=torch.float64), 4, period=1)
    indices, _ = moba.moba_select(q, k, block_size=4, topk=3)
    assert indices[0, -1, 0].tolist() == [9, 0, 1]


def test_nan_key_ranks_first_and_shows():
    q, k, v = gaussian(1, 40, 40, 1, 1, 8, dtype=torch.float64)
    k[0, 9] = math.nan
    indices, _ = moba.moba_select(q, k, block_size=4, topk=2)
    assert (indices[0, 12:, 0, 1] == 2).all()
    assert moba.moba_attention(q, k, v, block_size=4, topk=2)[0][0, 12:].isnan().all()


def test_pack_equals_separate_sequences():
    lengths_q, lengths_k = [5, 0, 1, 9], [8, 3, 1, 9]
    cu_q, cu_k = ragged(lengths_q, lengths_k)
    q, _, _ = gaussian(1, 15, 21, 4, 2, 8, dtype=torch.float64)
    _, k, v = gaussian(1, 15, 21, 4, 2, 8, dtype=torch.float64)
    options = dict(block_size=3, topk=2)
    out, lse = moba.moba_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    for s in range(4):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        want = moba.moba_attention(q[:, rows], k[:, keys], v[:, keys], **options)
        assert torch.equal(out[:, rows], want[0]) and torch.equal(lse[:, rows], want[1])


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in gaussian(1, 9, 9, 2, 1, 3, dtype=torch.float64))
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    def fn(q, k, v, sinks):
        return moba.moba_attention(q, k, v, block_size=2, topk=2, sinks=sinks)

    assert torch.autograd.gradcheck(fn, (q, k, v, sinks))


def test_no_gradient_through_the_gate():
    q, k, v = (x.requires_grad_() for x in gaussian(1, 12, 12, 1, 1, 4, dtype=torch.float64))
    options = dict(block_size=3, topk=2)
    indices, scores = moba.moba_select(q, k, **options)
    assert not scores.requires_grad
    free = torch.autograd.grad(moba.moba_attention(q, k, v, **options)[0].sum(), (q, k, v))
    fixed = torch.autograd.grad(moba.moba_attention(q, k, v, indices=indices, **options)[0].sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(free, fixed, strict=True))


def test_empty_rows_and_merge():
    q, k, v = gaussian(1, 4, 0, 2, 1, 8, dtype=torch.float64)
    out, lse = states.full_attention(q, k, v, causal=False)
    assert (out == 0).all() and (lse == -math.inf).all()
    outs = torch.stack([torch.full((3, 8), math.nan), torch.ones(3, 8)]).double()
    lses = torch.tensor([[-math.inf, math.inf, -math.inf], [0.0, 1.0, -math.inf]]).double()
    out, lse = states.merge_states(outs, lses)
    assert out.tolist() == [[1.0] * 8, [1.0] * 8, [0.0] * 8] and lse.tolist() == [0.0, 1.0, -math.inf]
