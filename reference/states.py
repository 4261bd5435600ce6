"""Attention states `(out, lse)`: dense attention and the merge, straight from their definitions."""

import math
from collections.abc import Callable

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

State = tuple[Tensor, Tensor]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, sinks: Tensor | None = None
) -> State:
    """Softmax attention over the keys where `mask` (broadcastable to `[b, h, i, j]`) is true."""
    dtype = accumulation_dtype(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[2] // k.shape[2]
    k, v = (repeat(x.to(dtype), "b j g d -> b j (g r) d", r=group) for x in (k, v))
    scores = einsum(q.to(dtype), k, "b i h d, b j h d -> b h i j") * scale
    mask = mask.expand(scores.shape)
    if sinks is not None:  # one more key, which has no value
        column = repeat(sinks.to(dtype), "h -> b h i 1", b=scores.shape[0], i=scores.shape[2])
        scores, mask = torch.cat([scores, column], -1), torch.cat([mask, torch.ones_like(column, dtype=torch.bool)], -1)
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)[..., : k.shape[1]]
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
    out = einsum(weights, v, "b h i j, b j h d -> b i h d")
    return out.to(q.dtype), rearrange(lse, "b h i 1 -> b i h")


def over_sequences(fn: Callable[..., State], q: Tensor, kv: tuple[Tensor, ...], cu_q: Tensor, cu_k: Tensor) -> State:
    """Run `fn(q, *kv)` on each sequence of a pack and join the results."""
    starts = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    parts = [fn(q[:, a:b], *(x[:, c:d] for x in kv)) for a, b, c, d in starts]
    first, second = zip(*parts, strict=True)
    return torch.cat(first, 1), torch.cat(second, 1)


def positions(q: Tensor, k: Tensor) -> Tensor:
    """Position of each query among the keys: queries sit at the end."""
    return torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> State:
    """Dense attention; `window` keeps the last `window` keys up to the query's own position."""
    if cu_seqlens_q is not None:

        def one(q: Tensor, k: Tensor, v: Tensor) -> State:
            return full_attention(q, k, v, causal=causal, window=window, scale=scale, sinks=sinks)

        return over_sequences(one, q, (k, v), cu_seqlens_q, cu_seqlens_k)
    i, j = positions(q, k)[:, None], torch.arange(k.shape[1], device=q.device)[None]
    mask = (j <= i) if causal else (j >= 0).expand(q.shape[1], -1)
    if window is not None:
        mask = mask & (j > i - window)
    return masked_attention(q, k, v, mask, scale, sinks)


def merge_states(outs: Tensor, lses: Tensor) -> State:
    """Merge `outs [n, ..., d]`, `lses [n, ...]` into the state over all their keys together."""
    lses = lses.masked_fill(lses == math.inf, -math.inf)
    outs = outs.masked_fill((lses == -math.inf)[..., None], 0.0)
    empty = (lses == -math.inf).all(0, keepdim=True)
    safe = lses.masked_fill(empty, 0.0)
    weights = safe.softmax(0).masked_fill(empty, 0.0)
    lse = safe.logsumexp(0, keepdim=True).masked_fill(empty, -math.inf)
    out = einsum(weights.to(accumulation_dtype(outs)), outs.to(accumulation_dtype(outs)), "n ..., n ... d -> ... d")
    return out.to(outs.dtype), lse[0]
