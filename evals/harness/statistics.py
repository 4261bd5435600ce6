"""Intervals of a mean, differences of two methods on the same samples, and exact tests; every one gives the same twice.

For the few runs of a benchmark, where samples are about normal, there is Student's interval: `measure.interval`.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = statistics.NormalDist().inv_cdf(0.975)
RESAMPLES = 10_000
MOST_DRAWS = 1 << 22  # numbers drawn at once


class Interval(NamedTuple):
    """A mean and its 95 % interval, in the unit of the samples; no bounds where the samples do not tell them."""

    mean: float
    low: float | None
    high: float | None
    n: int


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a share, without continuity correction. ValueError unless `0 <= successes <= n`."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson: needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    share, spread = successes / n, Z * Z / n
    half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    # At the ends the bound is the share itself, which rounding may miss.
    return Interval(share, 0.0 if successes == 0 else low, 1.0 if successes == n else high, n)


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of the mean. It depends on the values, not on their order.

    One sample tells no spread: no bounds. Samples all alike give an interval without width. ValueError without samples
    or where one is not finite.
    """
    x = np.sort(_finite("bootstrap", values))
    n, mean = len(x), math.fsum(x) / len(x)
    if x[0] == x[-1]:
        return Interval(x[0].item(), *([None] * 2 if n == 1 else [x[0].item()] * 2), n)
    rng = np.random.default_rng(seed)
    at_once = max(1, MOST_DRAWS // n)
    means = np.empty(resamples)
    for start in range(0, resamples, at_once):
        stop = min(start + at_once, resamples)
        means[start:stop] = x[rng.integers(n, size=(stop - start, n))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(mean, low.item(), high.item(), n)


def mean_interval(values: Sequence[float], *, share: bool, seed: int = 0) -> Interval:
    """The mean of scores: Wilson's interval where they are shares all 0 or 1, or all alike; else the bootstrap's.

    No score in [0, 1] varies more than a binary one of its mean, so Wilson's interval is on the safe side where a
    bootstrap would claim to know the mean of scores all alike for certain. ValueError for a share outside of [0, 1].
    """
    x = _finite("mean_interval", values)
    if share and (x.min() < 0 or x.max() > 1):
        raise ValueError(f"mean_interval: shares must be in [0, 1], got {x.min():g} to {x.max():g}")
    if share and (is_binary(x) or (x == x[0]).all()):
        return wilson(math.fsum(x), len(x))
    return bootstrap(values, seed=seed)


def is_binary(*values: Sequence[float]) -> bool:
    """Every score is 0 or 1: what McNemar's test and Wilson's interval are for."""
    return all(np.isin(x, (0, 1)).all() for x in values)


def paired_difference(
    ours: Sequence[float], base: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """`ours - base` on the same samples, in order: the bootstrap of the mean difference."""
    x, y = _finite("paired_difference", ours), _finite("paired_difference", base)
    if len(x) != len(y):
        raise ValueError(f"paired_difference: needs a pair per sample, got {len(x)} and {len(y)}")
    return bootstrap(x - y, seed=seed, resamples=resamples)


def mcnemar(ours: Sequence[float], base: Sequence[float]) -> float:
    """Exact two-sided McNemar test of binary scores on the same samples: p under equal chances of the discordant pairs.

    1 where no pair is discordant. ValueError for scores other than 0 and 1.
    """
    x, y = _finite("mcnemar", ours), _finite("mcnemar", base)
    if len(x) != len(y):
        raise ValueError(f"mcnemar: needs a pair per sample, got {len(x)} and {len(y)}")
    if not is_binary(x, y):
        raise ValueError("mcnemar: scores must be 0 or 1")
    won, lost = int((x > y).sum()), int((x < y).sum())
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def _finite(fn: str, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"{fn}: needs at least one sample, got {'none' if x.ndim == 1 else f'shape {x.shape}'}")
    if not np.isfinite(x).all():
        raise ValueError(f"{fn}: samples must be finite, got {x[~np.isfinite(x)][0]}")
    return x
