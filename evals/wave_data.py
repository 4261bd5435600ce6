"""Rows to compare RetroInfer's selectors on: planted structure, and what a Llama computes over real text."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab.evals import demo_model

KV_HEADS, GROUP, HEAD_DIM = 4, 4, 64
WIDTH, TOPICS, KINDS = 128, 64, 1024
STRETCH = 128  # tokens of one topic, on average
SHARPNESS = (1.0, 1.5, 2.0, 3.0)  # standard deviation of the logits of each query head of a group
LLAMA_HEADS, LLAMA_KV_HEADS, LLAMA_LAYERS = 8, 2, 2


class Row(NamedTuple):
    """Queries `q [n, Hq, D]` of tokens that follow `k, v [T, G, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor


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

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def unit(*shape: int) -> Tensor:
        return normal(*shape, WIDTH) / math.sqrt(WIDTH)

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

    to_key, to_value = normal(2, KV_HEADS, WIDTH, HEAD_DIM).unbind(0)
    k, v, q = (torch.einsum("tw,gwd->tgd", x, w) for x, w in ((state, to_key), (state, to_value), (asked, to_key)))
    spread = torch.einsum("ngd,tgd->ngt", q, k).std(-1) / math.sqrt(HEAD_DIM)
    sharp = torch.tensor(SHARPNESS) / spread[..., None]
    return Row((q[:, :, None] * sharp[..., None]).flatten(1, 2), k, v)


def llama(tokens: int, queries: int, seed: int) -> list[Row]:
    """Each layer's queries, keys and values, after rotary embedding, of a Llama from a config over Python's library.

    The model and the stretch of text follow `seed`. The weights are random: attention is close to uniform and keys are
    weakly clustered. Needs transformers.
    """
    total = tokens + queries
    ids = demo_model.stdlib_text((seed + 1) * total)[:, -total:]
    model = demo_model.build(LLAMA_LAYERS, total, torch.device("cpu"), LLAMA_HEADS, LLAMA_KV_HEADS, seed)
    return [
        Row(q[0, :, tokens:].transpose(0, 1), k[0, :, :tokens].transpose(0, 1), v[0, :, :tokens].transpose(0, 1))
        for q, k, v in _captured(model, ids)
    ]


def _captured(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each layer hands to its attention function, in order."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    taken: list[tuple[Tensor, Tensor, Tensor]] = []

    def capture(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        taken.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("attnlab_capture", capture)
    AttentionMaskInterface.register("attnlab_capture", sdpa_mask)
    model.set_attn_implementation("attnlab_capture")
    with torch.no_grad():
        model.model(input_ids=ids, use_cache=False)
    return taken
