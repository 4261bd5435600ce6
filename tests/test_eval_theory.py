"""MoBA's gate finds needles as often as theory says: by quadrature, by simulation, and by the library's own gate."""

import math
import statistics

import pytest
import torch
from scipy.stats import binomtest

import attnlab
from attnlab.evals import theory
from attnlab.evals.theory import Needle
from attnlab.moba_tools import hit_probability as of_equal_spread

TRIALS, GATE_TRIALS = 20_000, 3_072
# By chance such a difference is once in 10,000 tests; at these trials it is 1.4 points for scores and 3.5 for keys.
CHANCE = 1e-4
NORMAL = statistics.NormalDist()


def planted(block_size: int) -> Needle:
    """8192 tokens, three needles of logit .8 in a block, 1024 tokens routed, d = 128."""
    return theory.routed(8192, 128, block_size, 1024, 0.8, 3)


PUBLISHED = [(512, 0.48, 0.51), (256, 0.69, 0.71), (128, 0.89, 0.90), (64, 0.99, 0.99)]


@pytest.mark.parametrize(("block_size", "wanted", "simulated"), PUBLISHED)
def test_the_figures_known(block_size, wanted, simulated):
    needle = planted(block_size)
    assert needle.picks * block_size == 1024
    assert needle.snr == pytest.approx(2.4 * math.sqrt(128 / (2 * block_size)))
    found = theory.hit_probability(needle)
    assert round(found, 2) == wanted
    # Those were simulated in 400 trials.
    assert binomtest(round(400 * simulated), 400, found).pvalue > 0.05


@pytest.mark.parametrize("block_size", [512, 256, 128, 64])
def test_simulation_agrees(block_size):
    needle = planted(block_size)
    hits = theory.simulate(needle, TRIALS)
    assert binomtest(hits, TRIALS, theory.hit_probability(needle)).pvalue > CHANCE


@pytest.mark.parametrize("block_size", [512, 256, 128, 64])
def test_the_gate_hits_as_often(block_size):
    needle = planted(block_size)
    hits = theory.gate_hits(needle, GATE_TRIALS)
    assert binomtest(hits, GATE_TRIALS, theory.hit_probability(needle)).pvalue > CHANCE
    # and not as often as at the next size of blocks, half or twice as large
    for other in (planted(block_size // 2), planted(block_size * 2)):
        assert binomtest(hits, GATE_TRIALS, theory.hit_probability(other)).pvalue < CHANCE


def test_of_two_blocks_the_better():
    # One rival and one pick: a difference of two normals.
    needle = Needle(tokens=64, head_dim=16, block_size=32, picks=1, delta=0.9, needles=8)
    lead, spread = 8 * 0.9 / 32, math.sqrt((24 / 32 + 1) / (16 * 32))
    assert theory.hit_probability(needle) == pytest.approx(NORMAL.cdf(lead / spread), abs=1e-9)
    # Were both blocks of one spread, this would be the SNR's own share.
    assert NORMAL.cdf(needle.snr) == pytest.approx(of_equal_spread(needle.snr, 2, 1), abs=1e-9)


@pytest.mark.parametrize("picks", [1, 5, 31])
def test_without_a_signal_all_blocks_are_alike(picks):
    needle = Needle(32 * 64, 64, 64, picks, delta=0.0)
    assert theory.hit_probability(needle) == pytest.approx(picks / 32, abs=2e-3)


@pytest.mark.parametrize("picks", [4, 5])
def test_all_blocks_are_always_a_hit(picks):
    needle = Needle(256, 32, 64, picks, delta=-1.0)
    assert theory.hit_probability(needle) == 1.0
    assert theory.simulate(needle, 100) == 100
    assert theory.gate_hits(needle, 40) == 40


def test_probability_is_the_snrs():
    # Four times the head and four times the block: the same SNR, and so the same chance.
    small, large = Needle(32 * 64, 64, 64, 3, 0.7, 2), Needle(32 * 256, 256, 256, 3, 0.7, 2)
    assert small.snr == pytest.approx(large.snr)
    assert theory.hit_probability(small) == pytest.approx(theory.hit_probability(large), abs=4e-3)
    for needle in (small, large, *map(planted, (512, 256, 128, 64))):
        equal = of_equal_spread(needle.snr, needle.blocks, needle.picks)
        assert theory.hit_probability(needle) == pytest.approx(equal, abs=4e-3)


def test_keys_are_what_they_say():
    needle = Needle(4096, 64, 128, 4, delta=0.6, needles=5)
    q, k, blocks = theory.planted(needle, 48, seed=3)
    assert q.shape == (1, 48, 1, 64) and k.shape == (1, 4096, 1, 64) and q.dtype == k.dtype == torch.float32
    logits = q[0, :, 0] @ k[0, :, 0].T
    torch.testing.assert_close(q[0, :, 0] @ q[0, :, 0].T, torch.eye(48), atol=1e-6, rtol=0)
    mine = logits.unflatten(1, (32, 128))[torch.arange(48), blocks]
    near = (mine - 0.6).abs() < 1e-5
    assert (near.sum(-1) == 5).all()
    others = logits[(logits - 0.6).abs() >= 1e-5]
    # 196,368 logits: their spread is known to a fifth of a percent.
    assert others.std() == pytest.approx(1 / 8, rel=8e-3) and abs(others.mean()) < 1.2e-3
    assert blocks.bincount(minlength=32).max() == 2  # 48 queries over 32 blocks, in turn
    again, other = theory.planted(needle, 48, seed=3), theory.planted(needle, 48, seed=4)
    assert all(map(torch.equal, (q, k, blocks), again)) and not torch.equal(k, other[1])


def test_every_backend_of_the_gate_chooses_alike():
    needle = Needle(1024, 32, 64, 4, 0.8, 2)
    found = {name: theory.gate_hits(needle, 64, backend=name) for name in ("reference", "portable")}
    assert len(set(found.values())) == 1
    q, k, blocks = theory.planted(needle, 32)
    means = k[0, :, 0].unflatten(0, (16, 64)).mean(1)
    rank = ((q[0, :, 0] @ means.T) > (q[0, :, 0] * means[blocks]).sum(-1, keepdim=True)).sum(-1)
    chosen = attnlab.moba_select(q, k, block_size=64, topk=4, causal=False).indices[0, :, 0]
    assert torch.equal((chosen == blocks[:, None]).any(-1), rank < 4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(block_size=100), "Needle: block_size must divide the 8192 tokens, got 100"),
        (dict(needles=513), "Needle: needles must be from 1 to block_size 512, got 513"),
        (dict(picks=0), "Needle: picks must be a positive int, got 0"),
    ],
)
def test_bad_needles_say_what_is_wrong(change, complaint):
    needle = planted(512)._replace(**change)
    for call in (theory.hit_probability, lambda n: theory.simulate(n, 1), lambda n: theory.planted(n, 1)):
        with pytest.raises(ValueError, match=complaint):
            call(needle)


def test_too_many_queries():
    with pytest.raises(
        ValueError, match="planted: queries must be from 1 to 128, with room for their needles, got 129"
    ):
        theory.planted(planted(512), 129)
