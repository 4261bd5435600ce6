"""MoBA (arXiv 2502.13189) as one masked softmax: the mask is what the gate chose."""

import math

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from .states import State, accumulation_dtype, masked_attention, over_sequences, positions


def moba_select(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    routing: str = "head",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    max_blocks: int | None = None,
) -> State:
    """Block indices and their scores, `[b, t, h, slots]`; `h` is the KV heads under `routing="group"`.

    Slots hold the own block, the sink blocks, the local blocks, then the best candidates by falling score.
    A slot without a block holds index -1 and score -inf; a block chosen by rule has score +inf.
    """
    options = dict(block_size=block_size, topk=topk, causal=causal, routing=routing)
    options |= dict(sink_blocks=sink_blocks, local_blocks=local_blocks)
    longest = k.shape[1] if max_blocks is None else max_blocks * block_size
    max_blocks = math.ceil(longest / block_size)
    if cu_seqlens_q is not None:

        def one(q: Tensor, k: Tensor) -> State:
            return moba_select(q, k, max_blocks=max_blocks, **options)

        return over_sequences(one, q, (k,), cu_seqlens_q, cu_seqlens_k)

    dtype = accumulation_dtype(q)
    blocks = k.to(dtype).split(block_size, dim=1) if k.shape[1] else ()
    centroids = torch.stack([x.mean(1) for x in blocks], 1) if blocks else k.to(dtype)
    grouped = rearrange(q.to(dtype), "b t (g r) d -> b t g r d", g=k.shape[2])
    if routing == "group":
        scores = reduce(einsum(grouped, centroids, "b t g r d, b n g d -> b t g r n"), "b t g r n -> b t g n", "sum")
    else:
        scores = rearrange(einsum(grouped, centroids, "b t g r d, b n g d -> b t g r n"), "b t g r n -> b t (g r) n")

    block = torch.arange(centroids.shape[1], device=q.device)
    own = positions(q, k)[:, None] // block_size
    first = torch.full_like(own, len(block)) if not causal else own - local_blocks
    candidate = ((block >= sink_blocks) & (block < first))[None, :, None].expand(scores.shape)

    before = max(max_blocks - 1, 0)
    sink = min(sink_blocks, before if causal else max_blocks)
    local = min(local_blocks, before - sink) if causal else 0
    picks = min(topk - 1, before - sink - local) if causal else max(min(topk, max_blocks - sink), 1 - min(sink, 1))

    def rule(index: Tensor, valid: Tensor) -> State:
        index = index.masked_fill(~valid, -1)[None, :, None].expand(*scores.shape[:3], -1)
        return index, torch.full_like(index, math.inf, dtype=dtype).masked_fill(index < 0, -math.inf)

    parts = []
    if causal:
        parts.append(rule(own, own >= 0))
    if sink:
        index = torch.arange(sink, device=q.device).expand(len(own), -1)
        parts.append(rule(index, (index < own) if causal else (index < len(block))))
    if local:
        index = own - 1 - torch.arange(local, device=q.device)
        parts.append(rule(index, index >= sink_blocks))
    # A stable sort puts the lowest index first among equals; NaN counts as largest.
    ranked, order = scores.masked_fill(~candidate, -math.inf).sort(dim=-1, descending=True, stable=True)
    order = order.masked_fill(~candidate.gather(-1, order), -1)
    short = (0, max(picks - len(block), 0))
    order = torch.nn.functional.pad(order, short, value=-1)[..., :picks]
    ranked = torch.nn.functional.pad(ranked, short, value=-math.inf)[..., :picks]
    parts.append((order, ranked.masked_fill(order < 0, -math.inf)))
    indices, scores = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    return indices.int(), scores.detach()


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    routing: str = "head",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
) -> State:
    """Softmax attention over the keys of the selected blocks together; `indices` replays a selection."""
    if indices is None:
        indices, _ = moba_select(
            q,
            k,
            block_size=block_size,
            topk=topk,
            causal=causal,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            routing=routing,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
        )
    if cu_seqlens_q is not None:
        bounds = zip(
            *(x.tolist()[s] for x in (cu_seqlens_q, cu_seqlens_k) for s in (slice(-1), slice(1, None))), strict=True
        )
        parts = [
            _attend(q[:, a:b], k[:, c:d], v[:, c:d], indices[:, a:b], block_size, causal, scale, sinks)
            for a, b, c, d in bounds
        ]
        return torch.cat([o for o, _ in parts], 1), torch.cat([x for _, x in parts], 1)
    return _attend(q, k, v, indices, block_size, causal, scale, sinks)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    block_size: int,
    causal: bool,
    scale: float | None,
    sinks: Tensor | None,
) -> State:
    n = math.ceil(k.shape[1] / block_size)
    block = torch.arange(n, device=q.device)
    chosen = torch.zeros(*indices.shape[:3], n, dtype=torch.bool, device=q.device)
    for slot in indices.unbind(-1):
        chosen |= slot[..., None] == block
    chosen = chosen.repeat_interleave(q.shape[2] // indices.shape[2], dim=2)
    key = torch.arange(k.shape[1], device=q.device)
    mask = rearrange(chosen, "b i h n -> b h i n")[..., key // block_size]
    if causal:
        mask = mask & (key <= positions(q, k)[:, None])
    return masked_attention(q, k, v, mask, scale, sinks)
