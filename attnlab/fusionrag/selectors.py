"""Which context tokens are worth recomputing: FusionRAG's rule, its rivals', and an oracle, all at one budget.

A selector takes a `Request` and scores its context tokens, `[B, T]`, higher is better. The caller takes the best ones
among those whose keys and values are stale, the lower position where scores tie. Scores elsewhere may be anything.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .hook import Enough
from .importance import token_importance
from .request import Request

Selector = Callable[[Request], Tensor]


def fusionrag(request: Request) -> Tensor:
    """The question's attention in the last layer over the stale cache, softmax per chunk (arXiv 2601.12904).

    Costs the question's pass over the cache, and one read of the last layer's keys.
    """
    return _question_attention(request, range(request.layers - 1, request.layers), "chunk")


def prophet(request: Request) -> Tensor:
    """The question's attention in all layers over the stale cache, softmax over the whole context (ProphetKV).

    Costs the question's pass over the cache, and one more read of all layers' keys.
    """
    return _question_attention(request, range(request.layers), "context")


def kv_deviation(request: Request) -> Tensor:
    """How far the second layer's keys and values are from the stale ones (CacheBlend, arXiv 2405.16444).

    Costs the first layer of a full prefill, dense attention included.
    """
    if request.layers < 2:
        raise ValueError("FusionRAG: selector='kv_deviation' reads the second layer, the model has one")
    found = []

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        if layer == 1:
            found.append(_deviation(request, layer, k, v))
            raise Enough

    request.prefill(watch, question=False)
    return found[0]


def first_k(request: Request) -> Tensor:
    """The first tokens of every chunk, equally many of each (EPIC, arXiv 2410.15332). Costs nothing."""
    offsets = request.batch.offsets
    place = torch.arange(request.batch.context.shape[1], dtype=torch.int32, device=offsets.device)
    place = place.expand(offsets.shape[0], -1).contiguous()
    chunk = torch.searchsorted(offsets, place, right=True) - 1
    return (offsets.gather(1, chunk.clamp(min=0)) - place).float()


def random(request: Request) -> Tensor:
    """Uniform, from the caller's seed; a request's choice does not depend on the batch it is in. Costs nothing."""
    context = request.batch.context
    scores = torch.zeros(context.shape)
    for row, chunks in enumerate(request.batch.chunks):
        size = len(request.batch.system) + sum(map(len, chunks))
        scores[row, :size] = torch.rand(size, generator=torch.Generator().manual_seed(request.seed))
    return scores.to(context.device)


def oracle(request: Request) -> Tensor:
    """The question's true attention times how far the stale keys and values are from the true ones, over all layers.

    Knows what no cache can: it costs a full prefill, the very thing that reuse avoids. Something to measure the others
    against, and no strict bound: it ranks tokens one by one, and their errors depend on each other.
    """
    batch = request.batch
    score = torch.zeros(batch.context.shape, device=batch.context.device)
    rows = batch.question_positions.clamp(min=0)[..., None, None]

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        width = score.shape[1]
        asked = q.gather(1, rows.expand(-1, -1, *q.shape[2:]))
        seen = _importance(request, asked, k[:, :width], "context", scale)
        score.add_(seen * _deviation(request, layer, k[:, :width], v[:, :width]))

    request.prefill(watch, question=True)
    return score


SELECTORS: dict[str, Selector] = {f.__name__: f for f in (fusionrag, prophet, kv_deviation, first_k, random, oracle)}


def _question_attention(request: Request, layers: range, normalize: str) -> Tensor:
    score = torch.zeros(request.batch.context.shape, device=request.batch.context.device)

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        if layer in layers:
            score.add_(_importance(request, q, request.pool.keys(layer, score.shape[1]), normalize, scale))
        if layer == layers[-1]:
            raise Enough

    request.ask(watch)
    return score


def _importance(request: Request, q: Tensor, k: Tensor, normalize: str, scale: float) -> Tensor:
    return token_importance(
        q,
        k,
        request.batch.offsets,
        q_lengths=request.batch.question_lengths,
        normalize=normalize,
        scale=scale,
        backend=request.backend,
    )


def _deviation(request: Request, layer: int, k: Tensor, v: Tensor) -> Tensor:
    """Distance `[B, T]` of `k, v [B, T, Hkv, D]` from the stale ones, all heads together."""
    pool, width = request.pool, k.shape[1]
    off_k, off_v = (
        (fresh.float() - stale.float()).square().sum((2, 3))
        for fresh, stale in ((k, pool.keys(layer, width)), (v, pool.values(layer, width)))
    )
    return (off_k + off_v).sqrt()
