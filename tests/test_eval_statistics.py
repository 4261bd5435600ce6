"""Intervals and tests against scipy, against cases worked by hand, and by how often they cover what they should."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from attnlab.evals.harness import statistics
from attnlab.evals.harness.statistics import Interval, bootstrap, mcnemar, mean_interval, paired_difference, wilson


@pytest.mark.parametrize("n", [1, 2, 7, 30, 500])
def test_wilson_is_scipys(n):
    for successes in {0, 1, n // 3, n // 2, n - 1, n}:
        low, high = scipy.stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
        found = wilson(successes, n)
        assert found[1:3] == pytest.approx((low, high), abs=1e-12)
        assert (found.mean, found.n) == (successes / n, n)


def test_wilson_by_hand():
    # z^2 = 3.841459: half of 10 gives 0.5 -+ 1.959964 sqrt(0.025 + 0.00960365) / 1.3841459 = 0.5 -+ 0.263407.
    assert wilson(5, 10)[:3] == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)
    assert wilson(0, 4).low == 0.0 and wilson(4, 4).high == 1.0
    assert wilson(10, 10).low == pytest.approx(1 / (1 + 3.841459 / 10), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_needs_a_share(successes, n):
    with pytest.raises(ValueError, match=f"wilson: needs 0 <= successes <= n and n >= 1, got {successes} of {n}"):
        wilson(successes, n)


@pytest.mark.parametrize("kind", ["normal", "skewed", "quarters"])
def test_bootstrap_is_scipys(kind):
    rng = np.random.default_rng(5)
    x = dict(
        normal=rng.standard_normal(60), skewed=rng.exponential(2, 40), quarters=rng.integers(0, 5, 50) / 4
    )[kind]  # fmt: skip
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(1)
    ).confidence_interval
    found = bootstrap(x, resamples=20_000)
    assert found.mean == pytest.approx(x.mean())
    # Each bound is a quantile of 20,000 draws, known to a fiftieth of the mean's spread. Quarters' means lie on a grid.
    near = 0.08 * x.std() / math.sqrt(len(x)) + (0.25 / len(x) if kind == "quarters" else 0)
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=near)


def test_bootstrap_of_two_by_hand():
    # The mean of two draws of {0, 1} is 0 or 1 a quarter of the time each, so the bounds are the ends.
    assert bootstrap([0.0, 1.0]) == Interval(0.5, 0.0, 1.0, 2)
    # Of 40 with 4 ones a binomial count is drawn: P(0) = .015, P(<= 1) = .080; P(<= 7) = .958, P(<= 8) = .985.
    assert bootstrap([1.0] * 4 + [0.0] * 36)[:3] == pytest.approx((0.1, 1 / 40, 8 / 40))


def test_bootstrap_depends_on_values_and_seed_alone():
    x = np.random.default_rng(0).standard_normal(30)
    assert bootstrap(x) == bootstrap(x) == bootstrap(x[::-1].tolist())
    assert bootstrap(x, seed=1) != bootstrap(x)


def test_bootstrap_in_pieces(monkeypatch):
    x = np.random.default_rng(0).standard_normal(30)
    whole = bootstrap(x)
    monkeypatch.setattr(statistics, "MOST_DRAWS", 30 * 999)
    assert bootstrap(x) == whole


def test_one_sample_and_samples_all_alike():
    assert bootstrap([2.5]) == Interval(2.5, None, None, 1)
    assert bootstrap([2.5] * 9) == Interval(2.5, 2.5, 2.5, 9)
    assert mean_interval([0.5], share=False) == Interval(0.5, None, None, 1)
    # Shares: half of 4 is 2 of 4, were they binary; they are not, and vary less.
    assert mean_interval([0.5] * 4, share=True) == wilson(2, 4)
    assert mean_interval([1.0], share=True) == wilson(1, 1)


def test_which_interval():
    binary, shares = [1.0, 0.0, 1.0, 1.0], [1.0, 0.5, 1.0, 0.25]
    assert mean_interval(binary, share=True) == wilson(3, 4)
    assert mean_interval(shares, share=True) == bootstrap(shares)
    assert mean_interval(binary, share=False) == bootstrap(binary)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: bootstrap([]), "bootstrap: needs at least one sample, got none"),
        (lambda: bootstrap([[1.0]]), r"bootstrap: needs at least one sample, got shape \(1, 1\)"),
        (lambda: bootstrap([1.0, math.nan]), "bootstrap: samples must be finite, got nan"),
        (lambda: mean_interval([0.5, 1.5], share=True), r"mean_interval: shares must be in \[0, 1\], got 0.5 to 1.5"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "paired_difference: needs a pair per sample, got 1 and 2"),
        (lambda: mcnemar([1.0], [1.0, 0.0]), "mcnemar: needs a pair per sample, got 1 and 2"),
        (lambda: mcnemar([0.5], [1.0]), "mcnemar: scores must be 0 or 1"),
    ],
)
def test_bad_samples_say_what_is_wrong(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


@given(st.lists(st.sampled_from([(0, 0), (0, 1), (1, 0), (1, 1)]), min_size=1, max_size=60))
def test_mcnemar_is_scipys_binomial_test(pairs):
    ours, base = zip(*pairs, strict=True)
    won, lost = pairs.count((1, 0)), pairs.count((0, 1))
    wanted = scipy.stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(ours, base) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_by_hand():
    # 1 won and 5 lost of 6: twice (1 + 6) / 64.
    ours, base = [1] + [0] * 5 + [1] * 20, [0] + [1] * 5 + [1] * 20
    assert mcnemar(ours, base) == mcnemar(base, ours) == 14 / 64
    assert mcnemar([0, 1, 1], [0, 1, 1]) == 1.0
    assert mcnemar([0] * 1000, [1] * 1000) == 0.5**999


def test_paired_difference_takes_what_samples_share_out():
    rng = np.random.default_rng(3)
    shared = rng.standard_normal(80)
    ours, base = shared + 0.1 + 0.05 * rng.standard_normal(80), shared
    found = paired_difference(ours, base)
    assert found == bootstrap(ours - base) and found.n == 80
    assert found.mean == pytest.approx((ours - base).mean()) and found.low > 0.08 and found.high < 0.12
    opposite = paired_difference(base, ours)
    assert opposite.mean == pytest.approx(-found.mean)
    apart = bootstrap(ours)
    assert found.high - found.low < 0.1 * (apart.high - apart.low)
    assert paired_difference([1.0], [0.0]) == Interval(1.0, None, None, 1)


def covered(draw, interval, truth, trials=1500):
    rng = np.random.default_rng(11)
    found = [interval(draw(rng)) for _ in range(trials)]
    return sum(i.low <= truth <= i.high for i in found) / trials


# Of 1,500 intervals 95 % cover, give or take 0.6 (one deviation).
@pytest.mark.parametrize(("p", "n"), [(0.5, 40), (0.9, 60), (0.03, 100)])
def test_wilson_covers(p, n):
    share = covered(lambda rng: rng.binomial(n, p), lambda x: wilson(x, n), p)
    within = [x for x in range(n + 1) if wilson(x, n).low <= p <= wilson(x, n).high]
    exact = scipy.stats.binom.pmf(within, n, p).sum()
    assert 0.92 < exact < 0.985
    assert share == pytest.approx(exact, abs=0.025)


def test_bootstrap_covers():
    def shares(rng):
        return rng.binomial(4, 0.8, 60) / 4

    def interval(x):
        return bootstrap(x, resamples=1000)

    assert 0.92 < covered(shares, interval, 0.8) < 0.97


def test_paired_bootstrap_covers():
    def pairs(rng):
        base = rng.random(50)
        return base + rng.normal(0.2, 0.3, 50), base

    # An interval that ignored the pairing would cover almost always: this one must miss now and then.
    assert 0.92 < covered(pairs, lambda p: paired_difference(*p, resamples=1000), 0.2) < 0.97


def test_mcnemar_keeps_its_level():
    rng = np.random.default_rng(2)
    # Two methods as good as each other, right on 80 % each, together more often than by chance.
    ps = []
    for _ in range(1500):
        both = rng.random(100) < 0.7
        one, other = both | (rng.random(100) < 1 / 3), both | (rng.random(100) < 1 / 3)
        ps.append(mcnemar(one.astype(float), other.astype(float)))
    assert 0.015 < np.mean(np.array(ps) < 0.05) <= 0.05
