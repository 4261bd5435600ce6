"""How often MoBA's gate finds a needle: the law of its scores, in closed form, and the gate itself on such keys.

Keys are normal, of variance `1 / d` in each dimension, so a logit with a query of norm 1 has variance `1 / d`; a
needle's logit is `delta`. A block's score is the mean of its logits: with `needles` of them among its `B` keys the
needle's block leads by `needles * delta / B`, while the difference of two blocks has variance `2 / (d B)`. The lead
over the deviation is the SNR (Optimizing Mixture of Block Attention, arXiv 2511.11571): it decides how often the block
is chosen.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import attnlab

NODES = 2001  # of the quadrature
REACH = 9.0  # deviations that it covers
DRAWN = 1 << 22  # numbers drawn at once


class Needle(NamedTuple):
    """A query's problem.

    Attributes:
        tokens: keys; blocks of `block_size` divide them.
        head_dim: `d`.
        picks: blocks that the gate takes.
        delta: mean logit of a needle, where other keys' is 0 (queries have norm 1).
        needles: how many, in one block.
    """

    tokens: int
    head_dim: int
    block_size: int
    picks: int
    delta: float
    needles: int = 1

    @property
    def blocks(self) -> int:
        return self.tokens // self.block_size

    @property
    def snr(self) -> float:
        """`delta_mu sqrt(d / 2B)`, where needles in one block add up: `delta_mu = needles * delta`."""
        return self.needles * self.delta * math.sqrt(self.head_dim / (2 * self.block_size))


def routed(tokens: int, head_dim: int, block_size: int, read: int, delta: float, needles: int = 1) -> Needle:
    """With as many blocks of `block_size` as `read` tokens are, one at least."""
    return Needle(tokens, head_dim, block_size, max(1, read // block_size), delta, needles)


def hit_probability(needle: Needle) -> float:
    """Chance that the needle's block is among the picks: fewer than `picks` of the others score above it.

    By quadrature over the score of the needle's block, which is normal; the others pass it independently. ValueError
    for blocks that do not divide the tokens or cannot hold the needles.
    """
    mean, deviation, other = _law(needle)
    rivals = needle.blocks - 1
    if needle.picks > rivals:
        return 1.0
    z = np.linspace(-REACH, REACH, NODES)
    weight = np.exp(-z * z / 2)
    above = 0.5 * torch.special.erfc(torch.from_numpy((mean + deviation * z) / other / math.sqrt(2))).numpy()
    above = np.clip(above, 1e-300, 1 - 1e-16)
    j = np.arange(needle.picks)[:, None]
    ways = np.concatenate([[0.0], np.cumsum(np.log(rivals - j[:-1, 0]) - np.log1p(j[:-1, 0]))])[:, None]
    fewer = np.exp(ways + j * np.log(above) + (rivals - j) * np.log1p(-above)).sum(0)
    return min(1.0, float((fewer * weight).sum() / weight.sum()))


def simulate(needle: Needle, trials: int, seed: int = 0) -> int:
    """In how many of `trials` the block is chosen, where scores are drawn from their law."""
    mean, deviation, other = _law(needle)
    rng = np.random.default_rng(seed)
    hits = 0
    at_once = max(1, DRAWN // needle.blocks)
    for start in range(0, trials, at_once):
        n = min(at_once, trials - start)
        own = mean + deviation * rng.standard_normal((n, 1))
        others = other * rng.standard_normal((n, needle.blocks - 1))
        hits += int(((others > own).sum(1) < needle.picks).sum())
    return hits


def planted(needle: Needle, queries: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of norm 1 and keys among which each finds its needles in a block of its own.

    The queries are orthogonal, so that the keys' logits with one are independent of those with another.

    Returns:
        `q [1, queries, 1, D]`, `k [1, tokens, 1, D]` float32, and int64 `[queries]`, the blocks. ValueError for more
        queries than dimensions, or than a block's tokens can serve.
    """
    _law(needle)
    d, size = needle.head_dim, needle.block_size
    if not 1 <= queries <= min(d, needle.blocks * (size // needle.needles)):
        raise ValueError(f"planted: queries must be from 1 to {d}, with room for their needles, got {queries}")
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, queries, generator=g))[0].T
    k = torch.randn(needle.tokens, d, generator=g) / math.sqrt(d)
    # A block in turn, so that no two queries' needles meet in a token.
    turn = torch.randperm(needle.blocks, generator=g)
    place = torch.arange(queries)
    blocks, first = turn[place % needle.blocks], place // needle.blocks * needle.needles
    for i in range(needle.needles):
        rows = blocks * size + first + i
        k[rows] += (needle.delta - (k[rows] * q).sum(-1, keepdim=True)) * q
    return q[None, :, None], k[None, :, None], blocks


def gate_hits(needle: Needle, trials: int, *, seed: int = 0, backend: str = "auto") -> int:
    """In how many of `trials` queries `attnlab.moba_select` chooses the needle's block among all blocks."""
    hits = done = 0
    while done < trials:
        n = min(trials - done, needle.head_dim, needle.blocks * (needle.block_size // needle.needles))
        q, k, blocks = planted(needle, n, seed + done)
        options = dict(block_size=needle.block_size, topk=needle.picks, causal=False)
        chosen = attnlab.moba_select(q, k, **options, backend=backend).indices[0, :, 0]
        hits += int((chosen == blocks[:, None]).any(-1).sum())
        done += n
    return hits


def _law(needle: Needle) -> tuple[float, float, float]:
    """Mean and deviation of the needle's block's score, and the deviation of another's, whose mean is 0."""
    tokens, d, size, picks, delta, m = needle
    if size < 1 or tokens % size or tokens < size:
        raise ValueError(f"Needle: block_size must divide the {tokens} tokens, got {size}")
    if not 1 <= m <= size:
        raise ValueError(f"Needle: needles must be from 1 to block_size {size}, got {m}")
    if picks < 1:
        raise ValueError(f"Needle: picks must be a positive int, got {picks}")
    return m * delta / size, math.sqrt((size - m) / d) / size, 1 / math.sqrt(d * size)
