"""Rows to try RetroInfer on, and its clustering as one would write it on a napkin."""

import math

import numpy as np
import torch
from torch import Tensor

from attnlab.reference import retroinfer as wave
from attnlab.reference.states import full_attention
from attnlab.testing import Inputs, gaussian

CLOSE = dict(rtol=1e-12, atol=1e-12)
SMALL = wave.Options(sink=2, local=5, segment=40, tokens_per_cluster=4, iterations=4, update_every=12)


def row(tokens: int, group: int = 2, kv_heads: int = 2, d: int = 8, seed: int = 0, scale: float = 1.0) -> Inputs:
    """One query `[h, d]` and a row `[t, g, d]`, float64."""
    x = gaussian(1, 1, tokens, group * kv_heads, kv_heads, d, dtype=torch.float64, seed=seed, scale=scale)
    return Inputs(x.q[0, 0], x.k[0], x.v[0])


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = full_attention(q[None, None], k[None], v[None])
    return out[0, 0], lse[0, 0]


def numpy_kmeans(k: np.ndarray, options: wave.Options) -> tuple[np.ndarray, np.ndarray]:
    """Labels and directions of the clusters, without a cap, one key at a time."""
    x = k - k.sum(0) / len(k)

    def unit(a):
        length = math.sqrt(float((a * a).sum()))
        return a / length if length else a

    def best(key, directions):
        scores = [float(key @ c) for c in directions]
        return scores.index(max(scores))

    labels, directions = [], []
    for begin in range(0, len(x), options.segment):
        part = x[begin : begin + options.segment]
        count = -(-len(part) // options.tokens_per_cluster)
        own = [unit(part[(2 * j + 1) * len(part) // (2 * count)]) for j in range(count)]
        for _ in range(options.iterations - 1):
            chosen = [best(key, own) for key in part]
            sums = [sum((key for key, c in zip(part, chosen, strict=True) if c == j), 0 * x[0]) for j in range(count)]
            own = [unit(s) if (s != 0).any() else old for s, old in zip(sums, own, strict=True)]
        labels += [len(directions) + best(key, own) for key in part]
        directions += own
    if options.final_pass == "global":
        labels = [best(key, directions) for key in x]
    return np.array(labels), np.array(directions)
