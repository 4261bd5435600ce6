"""Rows to compare sparse attention on: planted structure, drift and sinks, and what a Llama computes over real text."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.evals import demo_model
from attnlab.evals.capture import captured

KV_HEADS, GROUP, HEAD_DIM = 4, 4, 64
WIDTH, TOPICS, KINDS = 128, 64, 1024
STRETCH = 128  # tokens of one topic, on average
SHARPNESS = (1.0, 1.5, 2.0, 3.0)  # standard deviation of the logits of each query head of a group
LLAMA_HEADS, LLAMA_KV_HEADS, LLAMA_LAYERS = 8, 2, 2
SINKS, SINK_VALUE = 4, 0.1  # first tokens that queries attend to whatever they ask, and the size of their values
DRIFT = 0.1  # share of a topic's variance that is new in the next stretch
NONE = -1


class Row(NamedTuple):
    """Queries `q [n, Hq, D]` of tokens that follow `k, v [T, G, D]`, and the keys they ask for.

    `needles` int64 `[n]`: `NONE` for a query that asks for no single key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    needles: Tensor


def planted(tokens: int, queries: int, seed: int) -> Row:
    """Keys and values as linear maps of the same hidden states, which have topics, kinds of token and needles.

    A token's state in 128 dimensions is a mixture, by variance, of its topic (40 %; 64 of them, each lasting for 128
    tokens on average), its kind (30 %; 1024, the r-th one as frequent as 1/r) and itself (30 %). Random projections,
    one pair per KV head, make keys and values, so like keys have like values and no cluster is given away by position.

    Half of the queries come from states drawn as a token's, topic and kind included; the others from the states of
    needles: as many tokens, at random places, each in a direction of its own, which its query shares to 70 %. The four
    query heads of a KV head are scaled to logits of standard deviation 1, 1.5, 2 and 3 over the row: from diffuse
    attention to attention that a needle fills.
    """
    generator = torch.Generator().manual_seed(seed)

    def unit(n: int) -> Tensor:
        return torch.randn(n, WIDTH, generator=generator) / math.sqrt(WIDTH)

    topics, kinds = unit(TOPICS), unit(KINDS)
    changes = torch.rand(tokens, generator=generator) < 1 / STRETCH
    stretches = torch.randint(TOPICS, (tokens + 1,), generator=generator)
    frequency = 1 / torch.arange(1.0, KINDS + 1)

    def states(topic: Tensor) -> Tensor:
        kind = torch.multinomial(frequency, len(topic), replacement=True, generator=generator)
        return math.sqrt(0.4) * topics[topic] + math.sqrt(0.3) * kinds[kind] + math.sqrt(0.3) * unit(len(topic))

    state = states(stretches[changes.cumsum(0)])
    needles = torch.randperm(tokens, generator=generator)[: queries // 2]
    state[needles] = unit(len(needles))
    asked = states(torch.randint(TOPICS, (queries - len(needles),), generator=generator))
    asked = torch.cat([math.sqrt(0.7) * state[needles] + math.sqrt(0.3) * unit(len(needles)), asked])

    none = torch.full((queries - len(needles),), NONE)
    q, k, v = _projected(state, asked, generator)
    return Row(_sharpened(q[:, :, None], k), k, v, torch.cat([needles, none]))


def drifting(tokens: int, queries: int, seed: int) -> Row:
    """Keys that cluster by topic, topics that drift, and sinks.

    A token's state is half its topic, by variance, and half itself. Topics last 128 tokens; each is the one before with
    a tenth of its variance new. Half of the queries ask for the last topic, the others for any. Projections and
    sharpness are `planted`'s. The first 4 keys of a head lie in a direction that no other key has, and every query has
    as much of it as puts half of its mass there; their values are small.
    """
    generator = torch.Generator().manual_seed(seed)

    def unit(n: int) -> Tensor:
        return torch.randn(n, WIDTH, generator=generator) / math.sqrt(WIDTH)

    topics = unit(-(-tokens // STRETCH))
    for before, topic in itertools.pairwise(topics):
        topic.mul_(math.sqrt(DRIFT)).add_(before, alpha=math.sqrt(1 - DRIFT))
    last = torch.full((queries // 2,), len(topics) - 1)
    chosen = torch.cat([last, torch.randint(len(topics), (queries - len(last),), generator=generator)])
    state, asked = (
        math.sqrt(0.5) * (topics[which] + unit(len(which))) for which in (torch.arange(tokens) // STRETCH, chosen)
    )
    q, k, v = _projected(state, asked, generator)
    sink = torch.nn.functional.normalize(torch.randn(KV_HEADS, 1, HEAD_DIM, generator=generator), dim=-1)
    q, k = (x[:, :, None] - (x[:, :, None] * sink).sum(-1, keepdim=True) * sink for x in (q, k))
    k[:SINKS] = math.sqrt(HEAD_DIM) * sink
    k, v[:SINKS] = k[:, :, 0], SINK_VALUE * v[:SINKS]
    q = _sharpened(q, k[SINKS:]).unflatten(1, (KV_HEADS, GROUP))
    others = (torch.einsum("ngrd,tgd->ngrt", q, k[SINKS:]) / math.sqrt(HEAD_DIM)).logsumexp(-1, keepdim=True)
    q = q + (others - math.log(SINKS)) * sink
    return Row(q.flatten(1, 2), k, v, torch.full((queries,), NONE))


def _projected(state: Tensor, asked: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[n, G, D]` of the states `asked`, keys and values `[T, G, D]` of `state`."""
    maps = torch.randn(2, KV_HEADS, WIDTH, HEAD_DIM, generator=generator)
    k, v, q = (torch.einsum("tw,gwd->tgd", x, w) for x, w in ((state, maps[0]), (state, maps[1]), (asked, maps[0])))
    return q, k, v


def _sharpened(q: Tensor, k: Tensor) -> Tensor:
    """`[n, G * 4, D]`: `q [n, G, 1, D]` in the four sizes that make logits of deviation `SHARPNESS`."""
    spread = torch.einsum("ngd,tgd->ngt", q[:, :, 0], k).std(-1) / math.sqrt(HEAD_DIM)
    sharp = torch.tensor(SHARPNESS) / spread[..., None]
    return (q * sharp[..., None]).flatten(1, 2)


def llama(tokens: int, queries: int, seed: int) -> list[Row]:
    """Each layer's queries, keys and values, after rotary embedding, of a Llama from a config over Python's library.

    The model and the stretch of text follow `seed`. The weights are random: attention is close to uniform and keys are
    weakly clustered. Needs transformers.
    """
    total = tokens + queries
    ids = demo_model.stdlib_text((seed + 1) * total)[:, -total:]
    model = demo_model.build(LLAMA_LAYERS, total, torch.device("cpu"), LLAMA_HEADS, LLAMA_KV_HEADS, seed)
    none = torch.full((queries,), NONE)
    return [Row(x.q[0], x.k[0, :tokens], x.v[0, :tokens], none) for x in captured(model, ids, queries)]
