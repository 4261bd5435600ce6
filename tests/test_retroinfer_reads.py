"""What a step says it read, against the attention over just that; and tokens read by chance."""

import pytest
import torch

from attnlab import WaveConfig, WaveIndex, wave_attention
from attnlab.kernels.retroinfer.spec import part
from attnlab.testing import gaussian

CONFIG = WaveConfig(
    sink=2, local=5, segment=40, tokens_per_cluster=4, iterations=4, update_every=12, retrieval_ratio=0.3,
    estimation="none",
)  # fmt: skip
CLOSE = dict(rtol=1e-10, atol=1e-10)
Q, K, V = gaussian(3, 1, 131, 4, 2, 8, dtype=torch.float64)
LENGTHS = [129, 64, 6]
HOWS = {
    "wave": {},
    "adaptive": {},
    **{name: dict(selector=name, token_budget=0.1) for name in ("oracle", "quest", "cluster", "random")},
    "full": dict(selector="full"),
}


def grown(how):
    change = dict(budget="adaptive", max_error=0.3) if how == "adaptive" else {}
    config = WaveConfig(**CONFIG.__dict__ | change)
    index = WaveIndex.build(K, V, config, lengths=[104, 60, 3], capacity=140)
    index.append(K[:, :25], V[:, :25], [25, 4, 3])
    return index


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("how", HOWS)
def test_the_tokens_read_are_those_attended_to(how, backend):
    index = grown(how)
    out, lse, read = wave_attention(Q, index, return_lse=True, return_read=True, backend=backend, **HOWS[how])
    assert read.dtype == torch.bool and read.shape == (3, 2, 140)
    for b, n in enumerate(LENGTHS):
        k, v = (x.repeat_interleave(2, 1) for x in index.row(b))
        seen = read[b, :, :n].repeat_interleave(2, 0)
        scores = torch.einsum("hd,thd->ht", Q[b, 0], k) / 8**0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(lse[b, 0], scores.logsumexp(-1), **CLOSE)
        torch.testing.assert_close(out[b, 0], torch.einsum("ht,thd->hd", scores.softmax(-1), v), **CLOSE)
        assert not read[b, :, n:].any()
        assert read[b, :, :2].all() and read[b, :, n - 5 : n].all()  # the steady zone
    counts = read.sum(-1)
    assert counts[2].tolist() == [6, 6] and (how == "full") == (counts[0].tolist() == [129, 129])


def test_the_share_read_by_token_is_the_budget():
    index = grown("oracle")
    steady = [n - i for n, i in zip(index.lengths, index.indexed, strict=True)]
    for name in ("oracle", "random"):
        _, read = wave_attention(Q, index, selector=name, token_budget=0.1, return_read=True)
        assert read.sum(-1).tolist() == [
            [s + min(i, round(0.1 * n))] * 2 for s, i, n in zip(steady, index.indexed, LENGTHS)
        ]


def chosen(index, seed, q=Q, backend="portable"):
    _, read = wave_attention(
        q, index, selector="random", token_budget=0.25, seed=seed, return_read=True, backend=backend
    )
    return read


def test_random_tokens_follow_from_seed_head_and_length():
    index = grown("random")
    one = chosen(index, 0)
    assert torch.equal(one, chosen(index, 0)) and not torch.equal(one, chosen(index, 1))
    for seed in (0, 7, 2**32 - 1):
        assert torch.equal(chosen(index, seed), chosen(index, seed, backend="reference"))
    assert torch.equal(one, chosen(index, 0, q=-Q))
    assert not torch.equal(one[0, 0], one[0, 1])
    alone = WaveIndex.build(K[1:2], V[1:2], CONFIG, lengths=[60], capacity=140)
    alone.append(K[1:2, :4], V[1:2, :4])
    assert torch.equal(chosen(alone, 0, q=Q[1:2]), one[1:2])
    alone.append(K[:1, :1], V[:1, :1])
    assert not torch.equal(chosen(alone, 0, q=Q[1:2])[..., 2:40], one[1:2][..., 2:40])


def test_random_tokens_are_any_with_one_chance():
    """400 draws of a quarter: each token's count is binomial, and two heads agree as often as chance has it."""
    index = WaveIndex.build(K[:1], V[:1], CONFIG, lengths=[127])
    read = torch.stack([chosen(index, seed, q=Q[:1])[0] for seed in range(400)])[..., 2:122].double()
    share = round(0.25 * 127) / 120
    spread = (share * (1 - share) / 400) ** 0.5
    assert (read.mean(0) - share).abs().max() < 4.5 * spread
    assert abs((read[:, 0] * read[:, 1]).mean().item() - share**2) < 0.01
    assert abs((read[..., 1:] * read[..., :-1]).mean().item() - share**2) < 0.01


def test_a_window_alone():
    """What StreamingLLM reads: one token more than the window never waits to be clustered."""
    config = WaveConfig(
        sink=4, local=32, segment=1, tokens_per_cluster=1, update_every=1, iterations=1, retrieval_ratio=0,
        estimation="none",
    )  # fmt: skip
    index = WaveIndex.build(K[:, :100], V[:, :100], config, capacity=140)
    for t in range(100, 131):
        index.append(K[:, t : t + 1], V[:, t : t + 1])
        _, read = wave_attention(Q, index, return_read=True)
        want = torch.zeros(140, dtype=torch.bool)
        want[:4] = want[t - 31 : t + 1] = True
        assert torch.equal(read, want.expand(3, 2, 140))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(seed=-1), ValueError, "seed must be a non-negative int, got -1"),
        (dict(seed=2**32), ValueError, "seed must be at most 4294967295, got 4294967296"),
        (dict(seed=1.0), ValueError, "seed must be a non-negative int, got 1.0"),
        (dict(return_read=1), TypeError, "return_read must be"),
        (dict(selector="chance", token_budget=0.1), ValueError, "'cluster', 'random', got 'chance'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        wave_attention(Q, grown("wave"), **change)


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("selector, budget", [("wave", None), ("random", 0.2)])
def test_opcheck(selector, budget, backend):
    index = grown("wave")
    query = (0.3, "sum", False, "none", part(0.3, max(index.clusters)), 0.0, False, selector, budget, 3, 140)
    args = (Q[:, 0], *index.store, *CONFIG.spec, *query, [], "clock", backend)
    torch.library.opcheck(torch.ops.attnlab.wave_attention.default, args)
