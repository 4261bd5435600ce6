"""Attention states `(out, lse)`: dense attention and the merge, straight from their definitions."""

import math
from collections.abc import Callable
from itertools import pairwise

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


def merge_states(
    outs: Tensor,
    lses: Tensor,
    *,
    indptr: Tensor | None = None,
    base2: bool = False,
    factors: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> State:
    """Merge `outs [n, ..., d]`, `lses [n, ...]` into the state over all their keys together.

    With `indptr [r + 1]` one state for each run of entries, `[r, ..., d]`. `factors [n]` multiply the lses. 8-bit
    results are divided by `out_scale` and clamped to the largest number there is.
    """
    out_dtype = out_dtype or outs.dtype
    lses = lses.masked_fill(lses == math.inf, -math.inf)
    if factors is not None:
        factors = rearrange(factors, "n -> n" + " 1" * (lses.ndim - 1))
        lses = torch.where(lses == -math.inf, lses, lses * factors)
    outs = outs.to(accumulation_dtype(outs))
    unit = math.log(2) if base2 else 1.0
    cuts = [0, len(outs)] if indptr is None else indptr.tolist()
    states = [_merge(outs[a:b], lses[a:b] * unit) for a, b in pairwise(cuts)]
    if not states:
        return outs.new_zeros(outs.shape, dtype=out_dtype), lses.new_zeros(lses.shape)
    out, lse = (torch.stack(x) for x in zip(*states, strict=True))
    if out_scale is not None:
        limit = torch.finfo(out_dtype).max
        out = (out / out_scale).clamp(-limit, limit)
    out, lse = out.to(out_dtype), lse / unit
    return (out[0], lse[0]) if indptr is None else (out, lse)


def _merge(outs: Tensor, lses: Tensor) -> State:
    empty = (lses == -math.inf).all(0, keepdim=True)
    safe = lses.masked_fill(empty, 0.0)
    weights = safe.softmax(0).masked_fill(empty, 0.0)
    outs = outs.masked_fill((weights == 0)[..., None], 0.0)
    lse = safe.logsumexp(0, keepdim=True) if len(safe) else safe.new_zeros(empty.shape)
    return einsum(weights, outs, "n ..., n ... d -> ... d"), lse.masked_fill(empty, -math.inf)[0]


def append_token(
    out: Tensor, lse: Tensor, q: Tensor, k_new: Tensor, v_new: Tensor, scale: float, base2: bool = False
) -> State:
    """Each query's own new key, `k_new, v_new [b, t, g, d]`, joins its state `out [b, t, h, d]`, `lse [b, t, h]`."""
    dtype = accumulation_dtype(q)
    group = q.shape[2] // k_new.shape[2]
    k, v = (repeat(x.to(dtype), "b t g d -> b t (g r) d", r=group) for x in (k_new, v_new))
    score = einsum(q.to(dtype), k, "b t h d, b t h d -> b t h") * scale
    outs, lses = torch.stack([out.to(dtype), v]), torch.stack([lse, score / math.log(2) if base2 else score])
    return merge_states(outs, lses, base2=base2, out_dtype=out.dtype)
